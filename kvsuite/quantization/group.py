"""MLC's group quantisation as pure functions: one scale a group, values packed into 32-bit words."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from kvsuite.errors import UserError

from .formats import max_level, values_per_word

# elements converted at a time: bounds what quantising a large matrix takes beside it
_SLAB = 1 << 22


def quantize_groups(
    weight: Tensor, *, bits: int, group: int, dtype: torch.dtype, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise a matrix.

    In ``dtype`` throughout, as mlc_llm's ``GroupQuantize._quantize``: ``scale = max|w| / m``, ``stored = clip(round(w /
    scale + m), 0, 2m)`` with halves away from zero. Padding is stored as 0. Where mlc_llm computes 0 / 0 (a group of
    zeros) the value m is stored, which is 0.

    Parameters
    ----------
    weight
        ``[rows, columns]``: output by input features.
    bits, group
        Bits of a value and inputs that share a scale; a word holds whole values, a group whole words.
    dtype
        Compute dtype; the weight is cast to it first.
    transposed
        Return both tensors input-major.

    Returns
    -------
    words, scales
        int32 words (the bits of MLC's uint32) ``[rows, ceil(columns / group) * words per group]`` with value i of a word
        at bit ``i * bits``, and scales ``[rows, ceil(columns / group)]`` in ``dtype``.

    Raises
    ------
    UserError
        If a weight is not finite in ``dtype``.
    """
    rows, columns = weight.shape
    groups = -(-columns // group)
    words = torch.empty(rows, groups * (group // values_per_word(bits)), dtype=torch.int32, device=weight.device)
    scales = torch.empty(rows, groups, dtype=dtype, device=weight.device)
    step = max(1, _SLAB // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        words[part], scales[part] = _quantize_rows(weight[part].to(dtype), bits, group)
    if not scales.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"--kv-quantization: the model has a weight that is not finite in {name}; choose a float32 format (q4f32_1) "
            "or check the checkpoint"
        )
    return (words.t().contiguous(), scales.t().contiguous()) if transposed else (words, scales)


def _quantize_rows(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    maximum, per_word = max_level(bits), values_per_word(bits)
    grouped = F.pad(weight, (0, -columns % group)).view(rows, -1, group)
    scale = grouped.abs().amax(-1) / maximum
    # a division by a scale that underflowed gives an infinity, which the clip takes, and 0 / 0 where the weight is 0
    level = (grouped / scale.unsqueeze(-1) + maximum).nan_to_num_(
        nan=float(maximum), posinf=torch.inf, neginf=-torch.inf
    )
    level.clamp_(0, 2 * maximum)
    # torch.round takes halves to even
    whole = level.floor()
    stored = (whole + (level - whole >= 0.5)).to(torch.int32).view(rows, -1)
    stored[:, columns:] = 0
    stored = stored.view(rows, -1, per_word)
    words = stored[..., 0].clone()
    for i in range(1, per_word):
        words |= stored[..., i] << (i * bits)
    return words, scale


def dequantize_groups(
    words: Tensor, scales: Tensor, *, bits: int, group: int, columns: int, transposed: bool = False
) -> Tensor:
    """Return the matrix ``[rows, columns]`` in the dtype of the scales: ``(stored - m) * scale``, rounded once.

    Parameters
    ----------
    words, scales
        As `quantize_groups` returns them.
    bits, group, transposed
        As they were given there.
    columns
        Input features without padding.
    """
    if transposed:
        words, scales = words.t(), scales.t()
    half_bits = bits * values_per_word(bits) // 2
    mask = (1 << half_bits) - 1
    # half a word at a time indexes a table of its values: several times faster on a CPU than shifting each value out
    if half_bits == 16 and sys.byteorder == "little":
        halves = words.contiguous().view(torch.int16).to(torch.int32) & mask
    else:
        halves = torch.stack((words & mask, (words >> half_bits) & mask), dim=-1)
    table = _half_words(bits, scales.dtype, scales.device)
    # and gathering single elements is several times faster than gathering rows
    element = _ELEMENTS.get(table.shape[1] * table.element_size())
    values = (table if element is None else table.view(element).flatten()).index_select(0, halves.flatten())
    values = values.view(scales.dtype)
    values = values.view(*scales.shape, group).mul_(scales.unsqueeze(-1))
    return values.view(scales.shape[0], -1)[:, :columns]


# dtypes that are as wide as a row of the table, by bytes
_ELEMENTS = {8: torch.int64, 16: torch.complex128}


@functools.lru_cache(maxsize=16)
def _half_words(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Levels in every half word, ``[2^(bits of half a word), values in it]``."""
    values = values_per_word(bits) // 2
    # a tensor made under inference mode could not be used outside of it
    with torch.inference_mode(False):
        codes = torch.arange(1 << (bits * values), device=device, dtype=torch.int32)
        shifts = torch.arange(0, bits * values, bits, device=device, dtype=torch.int32)
        stored = (codes.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return (stored - max_level(bits)).to(dtype)
