"""Static rows filled by the kernel against those filled by torch. On a CUDA device, or with TRITON_INTERPRET=1 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import DEVICE, INTERPRETED

from kvsuite.nanovllm import fill_kernel, static_batch
from kvsuite.nanovllm.batch import BatchBuilder, GroupInputs, StepBatch
from kvsuite.nanovllm.device_tables import GatheredRows

pytestmark = pytest.mark.gpu


def _step(seed: int, count: int, widths: list[int], *, kept: bool, flying: int) -> StepBatch:
    """A decode step of random numbers, whose tables lie on the device or come with it; every other id is in flight."""
    draws = np.random.default_rng(seed)
    ids = draws.integers(0, 1 << 40, count)
    if flying:
        ids[::2] = -1 - draws.integers(0, flying, len(ids[::2]))
    batch = BatchBuilder(DEVICE).build(
        ids=ids,
        positions=draws.integers(0, 1 << 40, count),
        counts=np.ones(count, dtype=np.int64),
        sample_rows=np.arange(count),
        groups=[
            GroupInputs(
                slots=draws.integers(0, 1 << 40, count),
                kv_lengths=draws.integers(1, 1 << 30, count),
                block_tables=draws.integers(0, 1 << 30, (count, width)).astype(np.int32),
                dropped=draws.integers(0, 1 << 30, count),
            )
            for width in widths
        ],
    )
    if kept:
        rows = torch.from_numpy(draws.permutation(2 * count)[:count]).to(DEVICE)
        tables = [
            GatheredRows(torch.randint(1 << 30, (2 * count, width + 3), dtype=torch.int32, device=DEVICE), rows, width)
            for width in widths
        ]
        groups = tuple(replace(part, tables=table) for part, table in zip(batch.groups, tables, strict=True))
        batch = replace(batch, groups=groups)
    return replace(batch, in_flight=torch.randint(1 << 40, (flying,), device=DEVICE)) if flying else batch


def _filled(by_kernel: bool, size: int, capacity: int, most: int, steps: list[StepBatch]) -> list[torch.Tensor]:
    """All numbers of a static batch after some steps in turn."""
    groups = len(steps[0].groups)
    whole = static_batch.static_batch(capacity, groups, most, DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_batch, "has_kernels", lambda device: by_kernel)
        for step in steps:
            static_batch.fill(static_batch.narrowed(whole, size), step)
        if len(steps) > 1:
            static_batch.pad(static_batch.narrowed(whole, size // 2))
    parts = [(part.slots, part.kv_lengths, part.dropped, part.block_tables) for part in whole.groups]
    return [whole.ids, whole.positions, *(tensor for part in parts for tensor in part)]


@settings(max_examples=25 if INTERPRETED else 60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    padding=st.integers(0, 3),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    kept=st.booleans(),
    flying=st.sampled_from([0, 1, 9]),
)
def test_the_kernel_writes_what_torch_writes(seed, counts, padding, widths, kept, flying):
    # a later step leaves less than an earlier one wrote
    steps = [_step(seed + at, count, widths, kept=kept, flying=flying) for at, count in enumerate(counts)]
    size = max(counts) + padding
    given_to = (size, size + 2, max(widths) + 4, steps)
    with pytest.MonkeyPatch.context() as patch:
        # as many programs a row as long tables have
        patch.setattr(fill_kernel, "_ENTRIES", 16)
        found = _filled(True, *given_to)
    for own, expected in zip(found, _filled(False, *given_to), strict=True):
        assert own.dtype == expected.dtype
        assert own.tolist() == expected.tolist()


def test_tokens_in_flight_and_tables_are_not_gathered_for_the_kernel(monkeypatch):
    step = _step(1, 3, [5], kept=True, flying=4)
    monkeypatch.setattr(static_batch, "has_kernels", lambda device: True)
    static_batch.fill(static_batch.static_batch(4, 1, 8, DEVICE), step)
    assert "ids" not in vars(step)
    assert "block_tables" not in vars(step.groups[0])
