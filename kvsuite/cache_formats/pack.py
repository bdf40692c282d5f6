"""The reference that packs and unpacks head vectors, to the bit (docs/quantization.md). All arithmetic is float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsuite.errors import CaseInvalid

from .cache_format import SideFormat

_LEVELS = {"int8": 127, "int4": 15}
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


@dataclass(frozen=True)
class Packed:
    """Packed head vectors.

    Parameters
    ----------
    codes
        uint8 ``[..., tokens, width]``: a byte an element (int8 in two's complement, fp8 its bits), or two elements a byte
        (int4: element 2i in the low half, 2i + 1 in the high one).
    scales
        float16 ``[..., tokens, groups * numbers]``, of a format per channel ``[..., tokens / group, head_size * numbers]``:
        of each group its scale, in int4 followed by its least value. No column where nothing is scaled.
    """

    codes: Tensor
    scales: Tensor


def pack(side: SideFormat, vectors: Tensor) -> Packed:
    """Pack head vectors ``[..., tokens, head_size]`` of any floating dtype; per channel a whole number of groups.

    What is not finite gives scales that are not (`is_refused`); no code stands for it.
    """
    x = vectors.float()
    if side.hadamard:
        x = hadamard(x)
    grouped = _grouped(side, x)
    if side.number == "int4":
        least = _float16_down(grouped.amin(-1))
        scale = _float16_up((grouped.amax(-1) - least.float()) / _LEVELS["int4"])
        levels = _divided(grouped - least.float().unsqueeze(-1), scale).round().clamp_(0, _LEVELS["int4"])
        codes = _ungrouped(side, levels.nan_to_num_(0.0).to(torch.uint8), x.shape)
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return Packed(codes, torch.stack((scale, least), -1).flatten(-2))
    if side.number == "int8":
        scale = _float16_up(grouped.abs().amax(-1) / _LEVELS["int8"])
        levels = _divided(grouped, scale).round().clamp_(-_LEVELS["int8"], _LEVELS["int8"])
        codes = _ungrouped(side, levels.nan_to_num_(0.0).to(torch.int8).view(torch.uint8), x.shape)
        return Packed(codes, scale)
    if not side.numbers_of_group:
        codes = x.clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).view(torch.uint8)
        return Packed(codes, x.new_empty((*x.shape[:-1], 0), dtype=torch.float16))
    scale = _float16_up(grouped.abs().amax(-1) / _FP8_MAX)
    levels = _divided(grouped, scale).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8).view(torch.uint8)
    return Packed(_ungrouped(side, levels, x.shape), scale)


def unpack(side: SideFormat, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Head vectors ``[..., tokens, head_size]`` in ``dtype``, rounded to it once."""
    codes = packed.codes
    if side.number == "int4":
        x = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float()
    elif side.number == "int8":
        x = codes.view(torch.int8).float()
    else:
        x = codes.view(_FP8).float()
    if count := side.numbers_of_group:
        grouped = _grouped(side, x)
        numbers = packed.scales.float().reshape(*grouped.shape[:-1], count)
        grouped = grouped * numbers[..., :1]
        if count == 2:
            grouped = grouped + numbers[..., 1:]
        x = _ungrouped(side, grouped, x.shape)
    if side.hadamard:
        x = hadamard(x)
    return x.to(dtype)


def refused_vectors(side: SideFormat, vectors: Tensor, packed: Packed) -> Tensor:
    """bool ``[]`` on the device: whether a number was not finite, or larger than float16 scales reach."""
    looked_at = packed.scales if side.numbers_of_group else vectors
    return ~torch.isfinite(looked_at).all()


def refuse_vectors(refused: Tensor, name: str) -> None:
    """Refuse what `refused_vectors` found.

    Raises
    ------
    CaseInvalid
        Naming the format.
    """
    if bool(refused):
        raise CaseInvalid(
            f"--kv-cache-dtype={name}: a key or a value is not finite, or larger than a scale in float16 reaches; give "
            "another --kv-dtype, or --kv-cache-dtype=auto"
        )


def hadamard(x: Tensor) -> Tensor:
    """Rotate float32 vectors ``[..., n]`` by the Hadamard matrix of Sylvester over the root of n, which is its own inverse.

    Butterflies of distance 1, 2, 4, ..., n / 2 in this order, ``(a + b, a - b)``, then one product by the float32 nearest to
    ``n ** -0.5``: each result depends on its own vector alone, to the bit, whatever stands beside it.
    """
    size = x.shape[-1]
    distance = 1
    while distance < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        distance *= 2
    return x * torch.tensor(size**-0.5, dtype=torch.float32, device=x.device)


def _grouped(side: SideFormat, x: Tensor) -> Tensor:
    """``[..., tokens, groups, elements]``, or per channel ``[..., groups, head_size, tokens of a group]``."""
    if side.per_channel:
        return x.reshape(*x.shape[:-2], -1, side.token_group, x.shape[-1]).transpose(-1, -2)
    return x.reshape(*x.shape[:-1], -1, side.group or x.shape[-1])


def _ungrouped(side: SideFormat, grouped: Tensor, shape: torch.Size) -> Tensor:
    return (grouped.transpose(-1, -2) if side.per_channel else grouped).reshape(shape)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` by groups; a scale of 0 has only zeros above it."""
    wide = scale.float().unsqueeze(-1)
    return torch.where(wide == 0, 0.0, x / wide)


def _float16_up(x: Tensor) -> Tensor:
    """The least float16 that is no smaller than ``x >= 0``; infinite beyond 65504."""
    near = x.to(torch.float16)
    bits = near.view(torch.int16)
    return torch.where(near.float() < x, bits + 1, bits).view(torch.float16)


def _float16_down(x: Tensor) -> Tensor:
    """The largest float16 that is no larger than ``x``."""
    near = x.to(torch.float16)
    bits = near.view(torch.int16)
    lower = torch.where(near > 0, bits - 1, torch.where(near == 0, torch.full_like(bits, -32767), bits + 1))
    return torch.where(near.float() > x, lower, bits).view(torch.float16)
