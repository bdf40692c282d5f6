"""Decode attention over tensors that stay where they are, so that a step can be captured.

Its grids depend on shapes alone: nothing is planned on the host, and the longest sequences come first by the device's own count
(`split_attention`; packed pages: `packed_split_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import GroupBatch, StepBatch
from .kv_pool import KVPool
from .layer_pages import LayerPages
from .paged_attention import written_to

if TYPE_CHECKING:
    from .step_attention import Heads


class PooledLayers:
    """Where layers keep their tokens, and attention of single tokens: what eager and captured attention have in common."""

    #: SMs that a step may use
    processors: int
    # whether neighbours in the stream may overlap
    _pdl = False

    def __init__(self, pools: Sequence[KVPool]) -> None:
        self.pools = list(pools)
        self._where = {
            layer: (number, index, pool)
            for number, pool in enumerate(self.pools)
            for index, layer in enumerate(pool.group.layers)
        }
        self._batch: StepBatch
        # in which order the step's sequences begin, by layer group
        self._orders: list[Tensor | None] = []

    def destination(self, layer: int) -> tuple[LayerPages, LayerPages, Tensor]:
        """Keys and values of a layer, and the slots of the step's tokens."""
        number, index, pool = self._where[layer]
        return (*pool.layer(index), self._batch.groups[number].slots)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        *pages, slots = self.destination(layer)
        for side, vectors in zip(pages, (key, value), strict=True):
            if side.side.is_packed:
                from .packed_vectors import store_packed

                store_packed(vectors.contiguous(), slots, side)
            else:
                side.codes.flatten(0, 1).index_copy_(0, slots, vectors.to(side.codes.dtype))

    def single(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of a step's first sequences, which bring a token each: ``[S, heads, head_dim]``, as the queries."""
        from .packed_split_attention import packed_split_attention, packed_splits_for
        from .split_attention import split_attention, splits_for

        number, index, pool = self._where[layer]
        part, count, group = self._batch.groups[number], query.shape[0], pool.group
        keys, values = pool.layer(index)
        common = (part.block_tables[:count], part.kv_lengths[:count], scale)
        programs = (count, group.kv_heads, self.processors)
        options: dict[str, Any] = {
            "dropped": part.dropped[:count],
            "window": group.window,
            "sinks": group.sinks,
            "order": self._orders[number],
            "pdl": self._pdl,
        }
        if pool.is_packed:
            splits = packed_splits_for(*programs, part.block_tables.shape[1] * pool.block_size)
            return packed_split_attention(query, keys, values, *common, splits=splits, **options)
        return split_attention(query, keys.codes, values.codes, *common, splits=splits_for(*programs), **options)


def order_of(part: GroupBatch, sequences: int) -> Tensor | None:
    """In which order a step's first sequences begin, int32 ``[sequences]``; ``None`` where there is nothing to order."""
    from .split_attention import longest_first

    if sequences < 2:
        return None
    order = torch.empty(sequences, dtype=torch.int32, device=part.kv_lengths.device)
    return longest_first(part.kv_lengths[:sequences], order)


class CapturedAttention(PooledLayers):
    """Decode attention over static tensors.

    Parameters
    ----------
    owner
        Eager attention, whose pools are attended to.
    batch
        Static tensors of a decode step.
    """

    def __init__(self, owner: PooledLayers, batch: StepBatch) -> None:
        super().__init__(owner.pools)
        self._batch = batch
        self.processors = owner.processors
        device = self.pools[0].device
        self._pdl = torch.cuda.get_device_capability(device)[0] >= 9
        self.kinds = [f"split {pool.group.format}" if pool.is_packed else "split" for pool in self.pools]
        # made here and not in the step: other graphs, whose memory a step's own is, come between layers that read it
        self._orders = [
            None if batch.sequences < 2 else torch.arange(batch.sequences, dtype=torch.int32, device=device)
            for _ in self.pools
        ]

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        return written_to(out, self.single(layer, query.contiguous(), scale))

    @property
    def takes_products(self) -> bool:
        """Whether `attend_product` can attend, in every layer."""
        return not any(pool.is_packed for pool in self.pools)

    @property
    def loads_at_once(self) -> bool:
        """Whether no part of any sequence's keys has more than one step of `attend_product`."""
        from .split_attention import splits_for
        from .step_attention import STEP_KEYS

        return all(
            part.block_tables.shape[1] * pool.block_size
            <= STEP_KEYS * splits_for(self._batch.sequences, pool.group.kv_heads, self.processors)
            for part, pool in zip(self._batch.groups, self.pools, strict=True)
        )

    def attend_product(
        self,
        layer: int,
        qkv: Tensor,
        squares: Tensor,
        heads: Heads,
        scale: float,
        arrivals: Tensor,
        *,
        at_once: bool = False,
    ) -> Tensor:
        """Store the step's tokens and attend, from the product for queries, keys and values on; see `step_attention`.

        ``at_once``: no keys are loaded ahead of those that are computed with, for where `loads_at_once`.
        """
        from .split_attention import splits_for
        from .step_attention import step_attention

        number, index, pool = self._where[layer]
        part, group = self._batch.groups[number], pool.group
        keys, values = pool.layer(index)
        splits, order = splits_for(qkv.shape[1], group.kv_heads, self.processors), self._orders[number]
        return step_attention(
            qkv, squares, self._batch.positions, part.slots, heads, keys.codes, values.codes, part.block_tables,
            part.kv_lengths, scale, arrivals, splits=splits, dropped=part.dropped, window=group.window, sinks=group.sinks,
            order=order, stages=1 if at_once else 3, pdl=self._pdl,
        )  # fmt: skip

    def begin(self, batch: StepBatch) -> None:
        """Part of the captured step, and its first: what reads the orders may begin before the kernel in front of it ends."""
        from .split_attention import longest_first

        for order, part in zip(self._orders, batch.groups, strict=True):
            if order is not None:
                longest_first(part.kv_lengths, order)
