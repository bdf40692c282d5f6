"""Decode attention over tensors that stay where they are, so that a step can be captured.

Few sequences, and all with a sliding window, go through `split_attention`, whose grid depends on shapes alone; many through
FlashInfer's ``fa2`` with tensor cores where it is built, which balances sequences of unequal length but wants a plan from the
host before every step (docs/measurements). Packed pages always go through `packed_split_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .batch import GroupBatch, StepBatch
from .kv_pool import KVPool
from .layer_pages import LayerPages
from .paged_attention import written_to

if TYPE_CHECKING:
    from .step_attention import Heads

#: programs of one sequence and key head each, up to which keys are cut and our own kernel attends
FEW_PROGRAMS = 512

Attend = Callable[[Tensor, LayerPages, LayerPages, float], Tensor]


class PooledLayers:
    """Where layers keep their tokens; what eager and captured attention have in common."""

    def __init__(self, pools: Sequence[KVPool]) -> None:
        self.pools = list(pools)
        self._where = {
            layer: (number, index, pool)
            for number, pool in enumerate(self.pools)
            for index, layer in enumerate(pool.group.layers)
        }
        self._batch: StepBatch
        self._attend: list[Attend] = []

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

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        number, index, pool = self._where[layer]
        return written_to(out, self._attend[number](query.contiguous(), *pool.layer(index), scale))


class KernelLayers(PooledLayers):
    """What eager attention by kernels holds and captured attention uses: sizes, the workspace, the module itself."""

    flashinfer: Any
    query_heads: int
    device: torch.device
    workspace: Tensor
    processors: int
    #: whether FlashInfer's decode kernels are there
    plans_decode: bool


def split(
    query: Tensor,
    pool: KVPool,
    keys: LayerPages,
    values: LayerPages,
    part: GroupBatch,
    scale: float,
    processors: int,
    pdl: bool = False,
) -> Tensor:
    """Attention of a step's first tokens, cut into as many parts as fill a device of ``processors``."""
    from .packed_split_attention import packed_split_attention, packed_splits_for
    from .split_attention import split_attention, splits_for

    count, group = query.shape[0], pool.group
    common = (part.block_tables[:count], part.kv_lengths[:count], scale)
    programs = (count, group.kv_heads, processors)
    options: dict[str, Any] = {
        "dropped": part.dropped[:count],
        "window": group.window,
        "sinks": group.sinks,
        "pdl": pdl,
    }
    if pool.is_packed:
        splits = packed_splits_for(*programs, part.block_tables.shape[1] * pool.block_size)
        return packed_split_attention(query, keys, values, *common, splits=splits, **options)
    return split_attention(query, keys.codes, values.codes, *common, splits=splits_for(*programs), **options)


def _event() -> Any:
    event: Any = torch.cuda.Event
    return event()


class CapturedAttention(PooledLayers):
    """Decode attention over static tensors. `prepare` goes before every replay.

    Parameters
    ----------
    owner
        Its pools and workspace are used.
    batch
        Static tensors of the step.
    few_programs
        ``sequences * kv_heads`` up to which keys are cut for our own kernel.
    """

    def __init__(self, owner: KernelLayers, batch: StepBatch, few_programs: int) -> None:
        super().__init__(owner.pools)
        self._batch = batch
        #: SMs that a step may use
        self.processors = owner.processors
        self._pdl = torch.cuda.get_device_capability(owner.device)[0] >= 9
        self.kinds: list[str] = []
        self._plans: list[PlannedDecode | None] = []
        for number, pool in enumerate(self.pools):
            # FlashInfer has no sinks, and its plan knows nothing of tokens that are gone
            few = not owner.plans_decode or batch.sequences * pool.group.kv_heads <= few_programs
            own = pool.is_packed or pool.group.window is not None or few
            kind = f"split {pool.group.format}" if pool.is_packed else "split"
            self.kinds.append(kind if own else "flashinfer fa2")
            if own:
                self._plans.append(None)
                self._attend.append(self._split(number, owner.processors))
            else:
                plan = PlannedDecode(owner, pool, batch.groups[number].block_tables.shape)
                self._plans.append(plan)
                self._attend.append(plan.attend(self._pdl))

    def _split(self, number: int, processors: int) -> Attend:
        part, pool = self._batch.groups[number], self.pools[number]

        def attend(query: Tensor, keys: LayerPages, values: LayerPages, scale: float) -> Tensor:
            return split(query, pool, keys, values, part, scale, processors, self._pdl)

        return attend

    @property
    def takes_products(self) -> bool:
        """Whether `attend_product` can attend, in every layer."""
        return not any(self._plans) and not any(pool.is_packed for pool in self.pools)

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
        return step_attention(
            qkv, squares, self._batch.positions, part.slots, heads, keys.codes, values.codes,
            part.block_tables, part.kv_lengths, scale, arrivals,
            splits=splits_for(qkv.shape[1], group.kv_heads, self.processors),
            dropped=part.dropped, window=group.window, sinks=group.sinks, stages=1 if at_once else 3, pdl=self._pdl,
        )  # fmt: skip

    def prepare(self, lengths: Sequence[Tensor]) -> None:
        """Plan a step: the group's KV lengths of all rows, padding included, int32 ``[B]`` on the host."""
        for plan, own in zip(self._plans, lengths, strict=True):
            if plan is not None:
                plan.prepare(own)

    def begin(self, batch: StepBatch) -> None:
        """Part of the captured step: FlashInfer wants the tables one behind the other."""
        from .fused_kernels import flatten_tables

        for plan, part in zip(self._plans, batch.groups, strict=True):
            if plan is not None:
                flatten_tables(part.block_tables, plan.starts, plan.blocks)


class PlannedDecode:
    """FlashInfer's decode of one group and batch size over fixed buffers."""

    def __init__(self, owner: KernelLayers, pool: KVPool, table_shape: Sequence[int]) -> None:
        size, most = table_shape
        device = owner.device
        self._shape = (owner.query_heads, pool.group.kv_heads, pool.group.head_dim, pool.block_size)
        self._dtype = pool.dtype
        # starts and fill of the last blocks travel in one copy
        self._staging = torch.zeros(2 * size + 1, dtype=torch.int32, pin_memory=True)
        self._sent = torch.zeros(2 * size + 1, dtype=torch.int32, device=device)
        self.starts, last = self._sent[: size + 1], self._sent[size + 1 :]
        self.blocks = torch.zeros(size * most, dtype=torch.int32, device=device)
        self._size = size
        self._wrapper = owner.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            owner.workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self.starts,
            paged_kv_indices_buffer=self.blocks,
            paged_kv_last_page_len_buffer=last,
            backend="fa2",
        )
        self._quick = owner.flashinfer.decode.fast_decode_plan
        self._copied = _event()
        self._first = True
        self.prepare(torch.ones(size, dtype=torch.int32))

    def prepare(self, lengths: Tensor) -> None:
        size, block_size = self._size, self._shape[3]
        counts = lengths.numpy()
        used = -(-counts // block_size)
        # the copies of the plan before this one may wait behind a step; their sources are written again here
        self._copied.synchronize()
        staged = self._staging.numpy()
        staged[0] = 0
        np.cumsum(used, out=staged[1 : size + 1])
        staged[size + 1 :] = counts - (used - 1) * block_size
        self._sent.copy_(self._staging, non_blocking=True)
        starts, last = self._staging[: size + 1], self._staging[size + 1 :]
        common = {"q_data_type": self._dtype, "kv_data_type": self._dtype}
        if self._first:
            self._wrapper.plan(starts, self.blocks[:0], last, *self._shape, **common)
            self._first = False
        else:
            # leaves out copies that are made above, and a slow maximum
            self._quick(
                self._wrapper, starts, self.blocks[:0], last, *self._shape, global_override_indptr_cpu=starts, **common
            )
        self._copied.record()

    def attend(self, pdl: bool) -> Attend:
        head_dim = self._shape[2]

        def attend(query: Tensor, keys: LayerPages, values: LayerPages, scale: float) -> Tensor:
            factor = scale * head_dim**0.5
            found: Tensor = self._wrapper.run(
                query, (keys.codes, values.codes), q_scale=None if factor == 1 else factor, enable_pdl=pdl
            )
            return found

        return attend
