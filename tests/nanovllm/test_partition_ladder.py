"""The partitions that a controller can come to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import CaseInvalid, CaseSkipped
from kvsuite.nanovllm.controller import ControllerInputs, ControllerSettings, ratios, sm_ratio
from kvsuite.nanovllm.partition_ladder import PartitionLadder, splits


@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.integers(0, 9)), max_size=40), st.sampled_from(["mlp", "h2o", "knorm"])
)
def test_every_share_that_the_rules_can_give_has_its_partition(moves, method):
    settings = ControllerSettings(
        method=method, factor=5, layers=36, kv_heads=8, head_dim=128, weight_bytes=1, token_bytes=1, bandwidth=1e12
    )
    share = settings.first_ratio
    for taken, pending in moves:
        inputs = ControllerInputs(
            counter=1, batch=8, seq_len=3968, expected_output=128, pending=pending, sm_ratio=share, streams=2,
            layers_per_step=4, prefill_s=1.0, decode_s=1.0, compress_s=taken, compress_samples=1,
        )  # fmt: skip
        share = sm_ratio(settings, inputs)
        assert share in ratios()


def test_counts_of_a_hopper_by_share():
    found = splits(132, (9, 0))
    assert list(found) == [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
    counts = [(one.decode_sms, one.prompt_sms) for one in found.values()]
    assert counts == [
        (112, 8), (112, 16), (104, 24), (96, 32), (88, 32), (80, 40), (72, 48), (72, 56), (64, 64), (56, 72), (48, 72),
    ]  # fmt: skip


def test_a_device_that_cannot_be_parted_by_every_share_is_refused():
    with pytest.raises(CaseInvalid, match=r"0\.9:0\.1 \(54:6 SMs\)"):
        splits(60, (9, 0))


def test_there_is_none_without_cuda():
    with pytest.raises(CaseSkipped, match="needs a CUDA device"):
        PartitionLadder(torch.device("cpu"))
