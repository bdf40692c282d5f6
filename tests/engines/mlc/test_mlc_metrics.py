"""MLC's counters between two readings, on the numbers of a real one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.engines.mlc.metrics import between, decode_steps

# as the real engine printed it
REAL: dict[str, Any] = {
    "engine_prefill_time_sum": 0.197978702, "engine_decode_time_sum": 0.01932068, "engine_jump_forward_time_sum": 1.363e-06,
    "prompt_tokens_sum": 208, "completion_tokens_sum": 24, "prefill_tokens_sum": 107, "decode_tokens_sum": 21,
    "jump_forward_tokens_sum": 0, "prefill_tokens_per_s": 540.46, "decode_tokens_per_s": 1086.92,
    "last_finished_request": {
        "prompt_tokens": 4, "completion_tokens": 6, "prefill_tokens": 4, "decode_tokens": 5, "jump_forward_tokens": 0,
        "prefill_tokens_per_s": 1217.57, "decode_tokens_per_s": 1614.31, "end_to_end_latency_s": 0.006382546,
        "ttft_s": 0.003285241, "inter_token_latency_s": 0.0010637576666666668,
    },
    "decode_time_by_batch_size": {"mean{batch_size=1}": 0.00072497, "count{batch_size=1}": 20},
    "draft_time_by_batch_size": {}, "verify_time_by_batch_size": {},
}  # fmt: skip
# of systems.md 1.10: the original's, in its order
ORIGINAL = [
    "engine_prefill_time_sum", "engine_decode_time_sum", "engine_jump_forward_time_sum", "prompt_tokens_sum",
    "completion_tokens_sum", "prefill_tokens_sum", "decode_tokens_sum", "jump_forward_tokens_sum",
    "prefill_tokens_per_s", "decode_tokens_per_s",
    *("last_finished_request_" + name for name in REAL["last_finished_request"]),
    "decode_time_by_batch_size_mean{batch_size=1}", "decode_time_by_batch_size_count{batch_size=1}",
]  # fmt: skip


def test_the_names_are_the_originals() -> None:
    found = between({}, REAL)
    assert list(found) == ORIGINAL
    assert found["prefill_tokens_per_s"] == pytest.approx(540.46, abs=0.01)
    assert found["decode_tokens_per_s"] == pytest.approx(1086.92, abs=0.01)
    assert found["decode_time_by_batch_size_mean{batch_size=1}"] == pytest.approx(0.00072497)


def test_only_what_came_between_is_counted() -> None:
    later = REAL | {
        "prefill_tokens_sum": 207, "engine_prefill_time_sum": 0.197978702 + 2.0, "completion_tokens_sum": 30,
        "decode_time_by_batch_size": {
            "mean{batch_size=1}": 0.00072497, "count{batch_size=1}": 20, "mean{batch_size=4}": 0.5, "count{batch_size=4}": 3,
        },
    }  # fmt: skip
    found = between(REAL, later)
    assert (found["prefill_tokens_sum"], found["completion_tokens_sum"], found["prompt_tokens_sum"]) == (100, 6, 0)
    assert found["prefill_tokens_per_s"] == pytest.approx(50)
    assert "decode_tokens_per_s" not in found
    assert found["decode_time_by_batch_size_count{batch_size=4}"] == 3
    assert "decode_time_by_batch_size_count{batch_size=1}" not in found
    assert decode_steps(REAL, later) == {4: 3}


@given(st.lists(st.floats(1e-4, 1), min_size=1, max_size=30), st.integers(0, 30))
def test_means_of_a_part_are_means_of_its_steps(times: list[float], begun: int) -> None:
    def reading(steps: list[float]) -> dict[str, Any]:
        mean = {"mean{batch_size=2}": sum(steps) / len(steps), "count{batch_size=2}": len(steps)} if steps else {}
        return {"decode_time_by_batch_size": mean}

    begun = min(begun, len(times) - 1)
    found = between(reading(times[:begun]), reading(times))
    rest = times[begun:]
    assert found["decode_time_by_batch_size_count{batch_size=2}"] == len(rest)
    assert found["decode_time_by_batch_size_mean{batch_size=2}"] == pytest.approx(sum(rest) / len(rest), rel=1e-6)
