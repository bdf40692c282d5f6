"""``fake_q3``: weights rounded to seven levels and kept dense, as the original program does. Quality only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 40
LEVELS = 3
# elements converted at a time
_SLAB = 1 << 22


def fake_int3(weight: Tensor) -> Tensor:
    """Round ``[rows, columns]`` to the levels -3 ... 3 of each group of 40 inputs; same dtype, computed in float32.

    ``scale = max|w| / 3``, with 1 for the maximum of a group of zeros; the last group is padded with zeros.
    """
    rows, columns = weight.shape
    grouped = F.pad(weight.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    largest = grouped.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest) / LEVELS
    levels = (grouped / scale).round_().clamp_(-LEVELS, LEVELS)
    return (levels * scale).view(rows, -1)[:, :columns].to(weight.dtype)


def linear_paths(model: Any) -> list[str]:
    """Every `nn.Linear`, the final layer included, subclasses too."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def is_tied(model: Any) -> bool:
    """Whether the final layer uses the embedding table."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def apply_fake_int3(model: Any) -> None:
    """Round the weights of every `nn.Linear` in place. A tied final layer gets a copy first: embeddings stay exact."""
    if is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    for path in linear_paths(model):
        weight = model.get_submodule(path).weight.data
        step = max(1, _SLAB // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            weight[start : start + step] = fake_int3(weight[start : start + step])
