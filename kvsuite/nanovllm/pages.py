"""Keys, or values, of a layer group in blocks of tokens, as a cache format stores them."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from kvsuite.cache_formats.cache_format import SideFormat
from kvsuite.cache_formats.pack import Packed, pack, refused_vectors, unpack

from .groups import LayerGroup
from .layer_pages import LayerPages

_WIDTHS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Pages:
    """One side of a `KVPool`.

    Parameters
    ----------
    side
        How vectors are stored, each on its own.
    group
        Layers and the shape of their tokens.
    blocks, block_size
        Blocks, and tokens of a block.
    device, dtype
        Of the tensors; packed ones come back in this dtype.

    Attributes
    ----------
    codes
        ``[layers, blocks, block_size, kv_heads, width]``: uint8 as `Packed.codes`, or the vectors in ``dtype``.
    scales
        float16 ``[layers, blocks, block_size, kv_heads, groups * numbers]`` as `Packed.scales`; no column where nothing is
        scaled.
    refused
        bool ``[]`` on the device: whether something was stored that the format has no numbers for.
    layers
        The same, layer by layer.
    """

    def __init__(
        self,
        side: SideFormat,
        group: LayerGroup,
        *,
        blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.side = side
        self.dtype = dtype
        shape = (len(group.layers), blocks, block_size, group.kv_heads)
        width, columns = group.head_dim, 0
        if side.is_packed:
            width, columns = side.width(group.head_dim), side.columns(group.head_dim)
        # zeros: attention may read a padded slot before anything is written there, and 0 * NaN is NaN
        self.codes = torch.zeros((*shape, width), dtype=torch.uint8 if side.is_packed else dtype, device=device)
        self.scales = torch.zeros((*shape, columns), dtype=torch.float16, device=device)
        self.refused = torch.zeros((), dtype=torch.bool, device=device)
        # of the first slot's heads, among all vectors
        layer, head = (torch.arange(count, device=device) for count in (len(group.layers), group.kv_heads))
        self._first = (layer * (blocks * block_size * group.kv_heads))[:, None, None] + head[:, None]
        self.layers = [
            LayerPages(codes, scales, self.refused, side) for codes, scales in zip(self.codes, self.scales, strict=True)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that hold something."""
        return [self.codes, self.scales] if self.scales.shape[-1] else [self.codes]

    def store(self, layer: int, slots: Tensor, vectors: Tensor) -> None:
        """Store ``vectors`` ``[n, kv_heads, head_dim]`` of the group's ``layer``-th layer in ``slots`` ``[n]``.

        What is not finite is noted (`refused`), and the host does not wait.
        """
        if not self.side.is_packed:
            self.codes[layer].flatten(0, 1).index_copy_(0, slots, vectors.to(self.dtype))
            return
        packed = pack(self.side, vectors)
        self.refused |= refused_vectors(self.side, vectors, packed)
        self.codes[layer].flatten(0, 1).index_copy_(0, slots, packed.codes)
        if self.scales.shape[-1]:
            self.scales[layer].flatten(0, 1).index_copy_(0, slots, packed.scales)

    def read(self, layer: int, slots: Tensor) -> Tensor:
        """What is stored in ``slots`` ``[n]`` of a layer, ``[n, kv_heads, head_dim]``."""
        return self._whole(*(tensor[layer].flatten(0, 1)[slots] for tensor in self.tensors))

    def read_blocks(self, layer: int, blocks: Tensor) -> Tensor:
        """What whole ``blocks`` ``[...]`` of a layer store, ``[..., block_size, kv_heads, head_dim]``."""
        return self._whole(*(tensor[layer][blocks] for tensor in self.tensors))

    def vectors(self, slots: Tensor, layers: slice = slice(None)) -> Tensor:
        """What is stored in ``slots`` ``[n]`` of some layers, ``[layers, kv_heads, n, head_dim]``."""
        # one copy, in the order in which heads are looked at
        index = self._first[layers] + slots * self.codes.shape[3]
        found = []
        for tensor in self.tensors:
            rows = wide(tensor.view(-1, tensor.shape[-1]))
            taken = rows.new_empty(index.numel(), rows.shape[1])
            take_rows(rows, index.flatten(), taken)
            found.append(taken.view(tensor.dtype).view(*index.shape, tensor.shape[-1]))
        return self._whole(*found)

    def _whole(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        if not self.side.is_packed:
            return codes
        if scales is None:
            scales = codes.new_empty((*codes.shape[:-1], 0), dtype=torch.float16)
        return unpack(self.side, Packed(codes, scales), self.dtype)


def take_rows(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy rows ``index`` ``[n]``, int64, of ``rows`` ``[m, width]`` to ``out`` ``[n, width]``; all contiguous."""
    if not has_kernels(rows.device):
        torch.index_select(rows, 0, index, out=out)
    elif len(index):
        from .gather_tokens import gather_rows

        gather_rows(rows, index, out)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels of ours run there: on CUDA, where triton is installed."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def wide(rows: Tensor) -> Tensor:
    """The same memory ``[..., width]`` in the widest numbers that divide a row, so that fewer are copied."""
    row_bytes = rows.shape[-1] * rows.element_size()
    return rows.view(next(each for each in _WIDTHS if row_bytes % each.itemsize == 0))
