"""Decode steps over tensors that stay where they are, so that what reads them can be captured."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import GroupBatch, StepBatch
from .kv_pool import SCRATCH_BLOCK
from .pages import has_kernels


def static_batch(size: int, groups: int, max_blocks: int, device: torch.device) -> StepBatch:
    """A decode step of ``size`` sequences of up to ``max_blocks`` blocks, all of them padding in block 0."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32, on: torch.device | str = device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=on)

    return StepBatch(
        fed=zeros(size, dtype=torch.int64),
        positions=zeros(size, dtype=torch.int64),
        query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
        sample_rows=torch.arange(size, device=device),
        groups=tuple(
            GroupBatch(
                slots=zeros(size, dtype=torch.int64),
                kv_lengths=torch.ones(size, dtype=torch.int32, device=device),
                tables=zeros(size, max_blocks),
                dropped=zeros(size),
                # the graph reads device tensors alone
                kv_lengths_host=zeros(0, on="cpu"),
                dropped_host=zeros(0, on="cpu"),
                read_tables=_nothing,
            )
            for _ in range(groups)
        ),
        decode_only=True,
        query_start_host=torch.arange(size + 1, dtype=torch.int32),
    )


def _nothing() -> NDArray[np.int32]:
    return np.zeros((0, 0), dtype=np.int32)


def narrowed(batch: StepBatch, size: int) -> StepBatch:
    """The first ``size`` rows of a static batch."""
    return StepBatch(
        fed=batch.fed[:size],
        positions=batch.positions[:size],
        query_start=batch.query_start[: size + 1],
        sample_rows=batch.sample_rows[:size],
        groups=tuple(
            GroupBatch(
                slots=part.slots[:size],
                kv_lengths=part.kv_lengths[:size],
                tables=part.block_tables[:size],
                dropped=part.dropped[:size],
                kv_lengths_host=part.kv_lengths_host,
                dropped_host=part.dropped_host,
                read_tables=part.read_tables,
            )
            for part in batch.groups
        ),
        decode_only=True,
        query_start_host=batch.query_start_host[: size + 1],
    )


def fill(static: StepBatch, batch: StepBatch) -> None:
    """Put a decode step into the first rows, and padding behind it: what an earlier step left would be written once more."""
    _write(static, batch, batch.sequences)


def pad(static: StepBatch) -> None:
    """Turn all rows into padding."""
    _write(static, static, 0)


def _write(static: StepBatch, batch: StepBatch, count: int) -> None:
    """Put the first ``count`` sequences of ``batch`` into the first rows, and padding into the others."""
    if has_kernels(static.fed.device):
        from .fill_kernel import fill_rows

        fill_rows(static, batch, count)
        return
    static.fed[:count].copy_(batch.ids[:count])
    static.fed[count:].zero_()
    static.positions[:count].copy_(batch.positions[:count])
    static.positions[count:].zero_()
    for own, given in zip(static.groups, batch.groups, strict=True):
        own.slots[:count].copy_(given.slots[:count])
        own.slots[count:].fill_(SCRATCH_BLOCK)
        own.kv_lengths[:count].copy_(given.kv_lengths[:count])
        own.kv_lengths[count:].fill_(1)
        own.dropped[:count].copy_(given.dropped[:count])
        own.dropped[count:].zero_()
        own.block_tables[:count, : given.width].copy_(given.block_tables[:count])
        own.block_tables[count:, :1].fill_(SCRATCH_BLOCK)
