"""Paged attention by plain torch: gather a sequence's blocks, mask by position, torch's own attention. Any device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from .batch import GroupBatch, StepBatch
from .groups import LayerGroup
from .kv_pool import KVPool
from .paged_attention import written_to


class KeyRotation(Protocol):
    """Turns keys to other positions, as `kvsuite.engines.rotary.Rotary` does with the model's own rotary embedding."""

    def table(self, length: int) -> None:
        """Make positions ``0 .. length - 1`` ready."""

    def rotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``keys`` ``[batch, heads, n, head_dim]`` to ``positions`` ``[n]`` or ``[batch, heads, n]``."""

    def unrotate(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`."""


class ReferenceAttention:
    """The meaning of paged attention, written for exactness and not for speed.

    Parameters
    ----------
    pools
        Keys and values of every layer group.
    rotation
        Needed where a group places its keys in the cache.
    """

    def __init__(self, pools: Sequence[KVPool], rotation: KeyRotation | None = None) -> None:
        self._rotation = rotation
        self._where = {
            layer: (number, index, pool)
            for number, pool in enumerate(pools)
            for index, layer in enumerate(pool.group.layers)
        }
        self._batch: StepBatch
        self._masks: dict[int, list[Tensor | None]] = {}

    def beside(self) -> Self:
        """The same for steps of another lane: what belongs to a step is replaced by `begin`."""
        return copy.copy(self)

    def begin(self, batch: StepBatch) -> None:
        self._batch = batch
        self._masks = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        number, index, pool = self._where[layer]
        slots = self._batch.groups[number].slots
        if pool.group.places:
            assert self._rotation is not None
            key = self._rotation.unrotate(key.transpose(0, 1)[None], self._batch.positions)[0].transpose(0, 1)
        pool.store(index, slots, key, value)

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        number, index, pool = self._where[layer]
        part = self._batch.groups[number]
        if self._batch.decode_only and pool.group.window is None and not pool.group.places:
            return written_to(out, self._decode(part, *pool.read_blocks(index, part.block_tables), query, scale))
        masks = self._masks.get(number)
        if masks is None:
            masks = self._masks[number] = self._make_masks(part, pool)
        out = torch.empty_like(query) if out is None else out
        starts = self._batch.query_start_host.tolist()
        for sequence, mask in enumerate(masks):
            rows = slice(starts[sequence], starts[sequence + 1])
            length = int(part.kv_lengths_host[sequence])
            slots = slots_of(part.block_tables[sequence], length, pool.block_size)
            own, its = (tensor.transpose(0, 1)[None] for tensor in pool.read(index, slots))
            if pool.group.places:
                own = self._placed(own, part, sequence, index, length, rows.stop - 1)
            if mask is not None and query.is_cuda:
                # with a mask and shared heads torch falls back to all scores of all heads at once, gigabytes of a long prompt
                shared = query.shape[1] // own.shape[1]
                own, its = (tensor.repeat_interleave(shared, dim=1) for tensor in (own, its))
            mixed = functional.scaled_dot_product_attention(
                query[rows].transpose(0, 1)[None],
                own,
                its,
                attn_mask=mask,
                is_causal=mask is None and rows.stop - rows.start > 1,
                scale=scale,
                enable_gqa=own.shape[1] != query.shape[1],
            )
            out[rows] = mixed[0].transpose(0, 1)
        return out

    def _decode(self, part: GroupBatch, keys: Tensor, values: Tensor, query: Tensor, scale: float) -> Tensor:
        """One token a sequence, of the blocks of its table: tensors alone decide, so that the step can be captured."""
        own, its = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (keys, values))
        mask = torch.arange(own.shape[2], device=own.device) < part.kv_lengths[:, None]
        mixed = functional.scaled_dot_product_attention(
            query[:, :, None],
            own,
            its,
            attn_mask=mask[:, None, None],
            scale=scale,
            enable_gqa=own.shape[1] != query.shape[1],
        )
        return mixed[:, :, 0]

    def _placed(self, own: Tensor, part: GroupBatch, sequence: int, index: int, length: int, newest: int) -> Tensor:
        """Rotate stored keys so that the newest stands where the model put its query."""
        assert self._rotation is not None
        places = part.places[sequence]
        if places is None:
            places = torch.arange(length, device=own.device)
        elif places.dim() > 1:
            places = places[index][None]
        return self._rotation.rotate(own, places + (self._batch.positions[newest] - (length - 1)))

    def _make_masks(self, part: GroupBatch, pool: KVPool) -> list[Tensor | None]:
        """What each sequence's queries see, bool ``[q, length]``; ``None``: everything up to the query itself."""
        counts = self._batch.query_start_host.diff().tolist()
        lengths, dropped = part.kv_lengths_host.tolist(), part.dropped_host.tolist()
        return [
            visible(pool.group, count, length, gone, pool.block_size, self._batch.ids.device)
            for count, length, gone in zip(counts, lengths, dropped, strict=True)
        ]


def visible(
    group: LayerGroup, queries: int, length: int, dropped: int, block_size: int, device: torch.device
) -> Tensor | None:
    """Mask of a sequence's last ``queries`` tokens over its ``length`` stored ones, bool ``[queries, length]``.

    ``dropped`` tokens lie between the blocks of the sinks and the rest. ``None`` where a plain causal mask of equal
    length, or none at all, does the same.
    """
    if group.window is None and (queries == 1 or queries == length):
        return None
    places = torch.arange(length, device=device)
    head = -(-group.sinks // block_size) * block_size
    positions = places + dropped * (places >= head)
    at = positions[-queries:, None]
    seen = positions <= at
    if group.window is not None:
        seen &= (positions < group.sinks) | (positions > at - group.window)
    return seen


def slots_of(table: Tensor, length: int, block_size: int) -> Tensor:
    """Slots of a sequence's first ``length`` tokens, int64 ``[length]``."""
    offsets = torch.arange(block_size, device=table.device)
    blocks = table[: -(-length // block_size)].to(torch.int64)
    return (blocks[:, None] * block_size + offsets).flatten()[:length]
