"""What kernels get of one layer's keys, or values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvsuite.cache_formats.cache_format import AUTO, SideFormat

_PLAIN = SideFormat(AUTO)


class LayerPages(NamedTuple):
    """One side of one layer's pages; a tuple, so that a step makes none.

    Parameters
    ----------
    codes
        ``[num_blocks, block_size, kv_heads, width]``, contiguous: uint8 as `kvsuite.cache_formats.pack.Packed` has them, or
        vectors in the model's dtype.
    scales
        float16 ``[num_blocks, block_size, kv_heads, groups * numbers]``, contiguous; no column where nothing is scaled.
    refused
        bool ``[]``: becomes true where something is stored that the format has no numbers for.
    side
        The format, per token.
    """

    codes: Tensor
    scales: Tensor
    refused: Tensor
    side: SideFormat


def plain_pages(vectors: Tensor) -> LayerPages:
    """Pages ``[num_blocks, block_size, kv_heads, head_dim]`` in the model's dtype."""
    scales = torch.empty(0, dtype=torch.float16, device=vectors.device)
    return LayerPages(vectors, scales, torch.zeros((), dtype=torch.bool, device=vectors.device), _PLAIN)
