"""Dry steps have the make-ups for which kernels differ, within the limits of a runtime."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.nanovllm.batch import StepBatch
from kvsuite.nanovllm.dry_steps import DrySteps
from kvsuite.nanovllm.fused_layers import _FEW_ROWS
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import SCRATCH_BLOCK, KVPool
from kvsuite.nanovllm.limits import Limits


def _counts(part: str, length: int, sequences: int, tokens: int) -> list[list[int]]:
    """New tokens of each sequence, of every step of a part."""
    device, seen = torch.device("cpu"), []
    limits = Limits(max_model_len=length, max_num_seqs=sequences, max_num_batched_tokens=tokens, block_size=16)
    pool = KVPool(LayerGroup((0,), 1, 16), num_blocks=1, block_size=16, device=device, dtype=torch.float32)

    def forward(batch: StepBatch) -> torch.Tensor:
        assert (batch.groups[0].block_tables == SCRATCH_BLOCK).all()
        seen.append(batch.query_start_host.diff().tolist())
        return torch.zeros(batch.sample_rows.shape[0], 4)

    getattr(DrySteps(forward, [pool], limits, device), part)()
    return seen


def test_short_sequences_make_a_large_step_together() -> None:
    steps = _counts("prompts", 384, 8, 8192)
    assert [384] * 5 + [128] in steps
    assert max(map(sum, steps)) > _FEW_ROWS
    # as many as there may be
    assert [384] * 3 in _counts("prompts", 384, 3, 8192)
    assert [1, 39] in _counts("warm_up", 384, 3, 40)
    # one that is long enough is a step alone
    assert [2048] in _counts("prompts", 4096, 8, 8192)


@pytest.mark.parametrize("part", ["singles", "prompts", "warm_up"])
@settings(max_examples=10)
@given(length=st.integers(2, 500), sequences=st.integers(1, 40), tokens=st.integers(40, 4096))
def test_no_step_passes_the_limits(part: str, length: int, sequences: int, tokens: int) -> None:
    for counts in _counts(part, length, sequences, tokens):
        assert 1 <= len(counts) <= sequences
        assert min(counts) >= 1
        assert max(counts) <= length
        assert sum(counts) <= tokens
