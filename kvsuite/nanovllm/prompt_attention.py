"""Attention of a step's prompts over paged keys: FlashInfer's kernels, or torch's own, which need no compiler.

FlashInfer reads pages; torch's flash attention (Dao, 2024) reads the keys of a step's prompts one behind the other, gathered
layer by layer. So does FlashInfer's ``fa3`` where a step brings a good part of the keys itself: Hopper's copy engine fetches
tiles of keys that lie together, and a third of the time goes on those that lie in pages. All see packed pages as they are
unpacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .kv_pool import KVPool
from .layer_pages import LayerPages
from .paged_attention import written_to

# tokens in the cache for one of the step, up to which gathering them is a small part of attending to them
_MOST_KEYS_A_QUERY = 4


@dataclass(frozen=True)
class PromptRows:
    """The prompts of a step in one layer group, on the host.

    Parameters
    ----------
    starts
        Where each sequence's queries begin, from 0 on, int32 ``[S + 1]``.
    lengths
        Tokens that each has in the cache, the step's own among them, ``[S]``.
    tables
        Block tables ``[S, max_blocks]``.
    """

    starts: NDArray[np.int32]
    lengths: NDArray[np.int64]
    tables: NDArray[np.int32]

    def used(self, block_size: int) -> NDArray[np.int64]:
        """Blocks that each sequence fills, ``[S]``."""
        return np.asarray(-(-self.lengths // block_size))

    def blocks(self, block_size: int) -> NDArray[np.int32]:
        """These blocks, one sequence behind the other."""
        columns = np.arange(self.tables.shape[1])[None]
        return np.asarray(self.tables[columns < self.used(block_size)[:, None]])

    def tokens(self, block_size: int) -> NDArray[np.int64]:
        """Where the tokens are in `blocks` laid out one behind the other, int64 ``[sum of lengths]``."""
        gaps = starts_of(self.used(block_size))[:-1] * block_size - starts_of(self.lengths)[:-1]
        return np.asarray(np.repeat(gaps, self.lengths) + np.arange(int(self.lengths.sum())))


def starts_of(counts: NDArray[Any]) -> NDArray[np.int32]:
    """Sums of the counts before each, int32, one longer than ``counts``."""
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on a device, which nobody waits for: the step before is still under way."""
    found = torch.from_numpy(array)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


class _Plans:
    """Plans of a FlashInfer wrapper, which it stages in one pinned buffer: it is free when the last ones were copied."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self._copied = event()

    def __enter__(self) -> None:
        self._copied.synchronize()

    def __exit__(self, *error: object) -> None:
        self._copied.record()


class PromptAttention(Protocol):
    """Attention of the prompts of one layer group."""

    #: for records
    name: str

    def plan(self, rows: PromptRows) -> None:
        """Plan a step."""

    def attend(
        self, query: Tensor, keys: LayerPages, values: LayerPages, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """Attention of queries ``[T, heads, head_dim]`` over a layer's pages, shaped like them; in ``out`` if given."""


class _Unpacked:
    """The blocks of a step's prompts, read out where the pool is packed."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._blocks: Tensor | None = None

    def plan(self, blocks: NDArray[np.int32]) -> NDArray[np.int32]:
        """Remember ``blocks``; return where they will be in what `read` gives."""
        if not self.pool.is_packed:
            return blocks
        self._blocks = _sent(blocks, self.pool.device)
        return np.arange(len(blocks), dtype=np.int32)

    def read(self, pages: LayerPages) -> Tensor:
        """Keys or values ``[blocks, block_size, kv_heads, head_dim]`` of a layer, in which a plan finds its blocks."""
        if self._blocks is None:
            return pages.codes
        from .packed_vectors import unpack_pages

        pool = self.pool
        out = torch.empty(pool.unpacked_shape(len(self._blocks)), dtype=pool.dtype, device=pool.device)
        unpack_pages(pages, self._blocks, out)
        return out


class _Gathered:
    """The keys and values of a step's prompts, one token behind the other."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._read = _Unpacked(pool)
        self._slots: Tensor

    def plan(self, rows: PromptRows) -> None:
        """Remember where the tokens of ``rows`` are."""
        size = self.pool.block_size
        blocks, tokens = self._read.plan(rows.blocks(size)), rows.tokens(size)
        self._slots = _sent(blocks[tokens // size].astype(np.int64) * size + tokens % size, self.pool.device)

    def read(self, keys: LayerPages, values: LayerPages) -> tuple[Tensor, Tensor]:
        """Of one layer, each ``[sum of lengths, kv_heads, head_dim]``."""
        from .gather_tokens import gather_tokens

        return gather_tokens(self._read.read(keys), self._read.read(values), self._slots)


class FlashInferPrompts:
    """FlashInfer's ``fa2`` or ``fa3`` over the pages.

    Parameters
    ----------
    flashinfer
        The module.
    pool
        Of the layer group.
    query_heads
        Query heads of a layer.
    workspace
        Shared with others on the same stream.
    library
        ``fa2`` or ``fa3``.
    """

    def __init__(self, flashinfer: Any, pool: KVPool, query_heads: int, workspace: Tensor, library: str) -> None:
        self.name = f"flashinfer {library}"
        self._read = _Unpacked(pool)
        self._heads = query_heads
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=library)
        self._plans = _Plans()

    def plan(self, rows: PromptRows) -> None:
        pool = self._read.pool
        size, used = pool.block_size, rows.used(pool.block_size)
        with self._plans:
            self._wrapper.plan(
                torch.from_numpy(rows.starts),
                torch.from_numpy(starts_of(used)),
                _sent(self._read.plan(rows.blocks(size)), pool.device),
                torch.from_numpy((rows.lengths - (used - 1) * size).astype(np.int32)),
                self._heads,
                pool.group.kv_heads,
                pool.group.head_dim,
                size,
                causal=True,
                q_data_type=pool.dtype,
                kv_data_type=pool.dtype,
                non_blocking=True,
            )

    def attend(
        self, query: Tensor, keys: LayerPages, values: LayerPages, scale: float, out: Tensor | None = None
    ) -> Tensor:
        factor = scale * self._read.pool.group.head_dim**0.5
        stored = (self._read.read(keys), self._read.read(values))
        # left to itself it fills the output with zeros first
        out = torch.empty_like(query) if out is None else out
        found: Tensor = self._wrapper.run(query, stored, q_scale=None if factor == 1 else factor, out=out)
        return found


class HopperPrompts:
    """FlashInfer's ``fa3`` over gathered keys, or over the pages where a step brings few of many.

    Parameters
    ----------
    flashinfer, pool, query_heads, workspace
        As of `FlashInferPrompts`.
    """

    def __init__(self, flashinfer: Any, pool: KVPool, query_heads: int, workspace: Tensor) -> None:
        self._paged = FlashInferPrompts(flashinfer, pool, query_heads, workspace, "fa3")
        self.name = self._paged.name
        self._heads = query_heads
        self._keys = _Gathered(pool)
        self._wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        self._plans = _Plans()
        self._gathers = False
        self._starts: tuple[Tensor, Tensor]
        self._planned_scale: float | None = None

    def plan(self, rows: PromptRows) -> None:
        self._gathers = int(rows.lengths.sum()) <= _MOST_KEYS_A_QUERY * int(rows.starts[-1])
        if not self._gathers:
            self._paged.plan(rows)
            return
        self._keys.plan(rows)
        self._starts = (torch.from_numpy(rows.starts), torch.from_numpy(starts_of(rows.lengths)))
        self._planned_scale = None

    def attend(
        self, query: Tensor, keys: LayerPages, values: LayerPages, scale: float, out: Tensor | None = None
    ) -> Tensor:
        if not self._gathers:
            return self._paged.attend(query, keys, values, scale, out)
        if self._planned_scale != scale:
            # which only the layers know
            group, dtype = self._keys.pool.group, self._keys.pool.dtype
            with self._plans:
                self._wrapper.plan(
                    *self._starts,
                    self._heads,
                    group.kv_heads,
                    group.head_dim,
                    causal=True,
                    sm_scale=scale,
                    q_data_type=dtype,
                    kv_data_type=dtype,
                    non_blocking=True,
                )
            self._planned_scale = scale
        found: Tensor = self._wrapper.run(query, *self._keys.read(keys, values), out=out)
        return found


class TorchPrompts:
    """Torch's flash attention over gathered keys: its kernels come with torch.

    Parameters
    ----------
    pool
        Of the layer group.
    """

    name = "torch flash"

    def __init__(self, pool: KVPool) -> None:
        self._keys = _Gathered(pool)
        self._starts: tuple[Tensor, Tensor]
        self._longest: tuple[int, int]

    def plan(self, rows: PromptRows) -> None:
        device = self._keys.pool.device
        self._keys.plan(rows)
        self._starts = (_sent(rows.starts, device), _sent(starts_of(rows.lengths), device))
        self._longest = int(np.diff(rows.starts).max()), int(rows.lengths.max())

    def attend(
        self, query: Tensor, keys: LayerPages, values: LayerPages, scale: float, out: Tensor | None = None
    ) -> Tensor:
        # what `torch.nn.attention.varlen` calls, whose own arguments differ between releases; a query sees its own and all
        # earlier tokens where the ends of queries and keys meet
        found: Tensor = torch.ops.aten._flash_attention_forward(
            query, *self._keys.read(keys, values), *self._starts, *self._longest, 0.0, True, False, scale=scale
        )[0]
        return written_to(out, found)
