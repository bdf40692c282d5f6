"""Turn a model's weights into group format or another dtype, module by module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .formats import GroupFormat
from .modules import GroupEmbedding, GroupLinear
from .packed import PackedWeight
from .targets import Target, replace_module


def convert_groups(model: Any, spec: GroupFormat, targets: list[Target]) -> None:
    """Pack the weights of ``targets`` in place and cast every other parameter to the compute dtype.

    One dense matrix at a time lies beside the model. Tied modules share one `PackedWeight`, which lies row by row even
    in the transposed format: an embedding gathers rows.
    """
    tables = {target.shares or target.path for target in targets if target.is_table}
    packed: dict[str, PackedWeight] = {}
    for target in targets:
        owner = target.shares or target.path
        module = model.get_submodule(target.path)
        if owner not in packed:
            packed[owner] = PackedWeight.pack(
                module.weight.detach(), spec, transposed=spec.transposed and owner not in tables
            )
        new = GroupEmbedding(packed[owner]) if target.is_table else GroupLinear(packed[owner], module.bias)
        replace_module(model, target.path, new.eval())
        # frees the dense weight before the next one is packed
        del module
    cast_parameters(model, getattr(torch, spec.dtype))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters in place. Buffers keep their dtype: rotary frequencies need theirs."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
