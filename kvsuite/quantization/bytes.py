"""Weight bytes: measured from storages, and predicted from shapes before anything is converted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import bitsandbytes as bnb
from .fake_int3 import is_tied
from .formats import CAST_FORMATS, GROUP_FORMATS
from .registry import FAKE, quantization
from .targets import Target, find_targets


def weight_bytes(module: nn.Module) -> int:
    """Sum of the distinct storages of parameters and buffers, bitsandbytes' own tensors included: tied weights once."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        tensors.extend(bnb.quantization_state(part))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def step_weight_bytes(model: Any) -> int:
    """Weight bytes that a decode step has to read: of the language model, all but a table that the final layer does not use."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and _storages(table) <= _storages(head)
    language = getattr(getattr(model, "model", None), "language_model", None)
    read = model if language is None or head is None else nn.ModuleList([language, head])
    return weight_bytes(read) - (0 if tied else weight_bytes(table))


def predicted_weight_bytes(source: Any, name: str, *, dtype: torch.dtype | None = None) -> int:
    """Bytes that the weights will take, in closed form.

    A packed matrix of R rows and C columns takes ``R * (4 * words + s * ceil(C / group))`` bytes, with ``ceil(C / group) *
    group / values per word`` words of a row and s bytes a scale; tied matrices count once; everything else takes its
    elements times the size of its dtype.

    Parameters
    ----------
    source
        The model before conversion, or a transformers configuration (the model is then built without storage).
    name
        Of the format.
    dtype
        Of the weights as loaded, for a configuration; float32 if left out.

    Raises
    ------
    UserError
        If the format is unknown.
    """
    quantization(name)
    model: Any = source if isinstance(source, nn.Module) else _without_storage(source, dtype or torch.float32)
    total: int = sum(buffer.nbytes for buffer in model.buffers())
    if name in GROUP_FORMATS:
        spec = GROUP_FORMATS[name]
        size = int(getattr(torch, spec.dtype).itemsize)
        targets = find_targets(model, ends=spec.ends)
        total += sum(spec.bytes(rows, columns, size) for rows, columns in _shapes(model, targets))
        return total + _dense_bytes(model, targets, size)
    if name in bnb.NAMES:
        targets = find_targets(model, ends=False)
        total += sum(bnb.linear_bytes(name, rows, columns) for rows, columns in _shapes(model, targets))
        return total + _dense_bytes(model, targets, None)
    if name in CAST_FORMATS:
        return total + _dense_bytes(model, [], int(getattr(torch, CAST_FORMATS[name]).itemsize))
    if name == FAKE and is_tied(model):
        total += model.get_output_embeddings().weight.nbytes
    return total + _dense_bytes(model, [], None)


def _shapes(model: Any, targets: list[Target]) -> list[tuple[int, int]]:
    weights = [model.get_submodule(target.path).weight for target in targets if target.shares is None]
    return [(weight.shape[0], weight.shape[1]) for weight in weights]


def _dense_bytes(model: Any, targets: list[Target], floating_size: int | None) -> int:
    """Bytes of the parameters that are not a target's weight; floating ones with ``floating_size`` bytes an element."""
    packed = {id(model.get_submodule(target.path).weight) for target in targets}
    return sum(
        p.numel() * (floating_size if floating_size and p.is_floating_point() else p.element_size())
        for p in model.parameters()
        if id(p) not in packed
    )


def _storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


def _without_storage(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = getattr(config, "vision_config", None) is not None
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype)
