"""Prometheus text of a server, and whose times its histograms tell."""

from __future__ import annotations

import pytest

from kvsuite.engines.server.counters import between, engine_times, preemptions, read_counters

VLLM = """\
# HELP vllm:num_preemptions_total Cumulative number of preemptions.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 2.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0"} 1.7e+09
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="length",model_name="a \\"b\\" } c"} 7
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} NaN
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 9
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 2
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 4
vllm:time_to_first_token_seconds_count{engine="0"} 4
vllm:time_to_first_token_seconds_sum{engine="0"} 1.0 1700000000
nonsense
broken{ 1
"""


def test_what_grows_is_read_and_nothing_else() -> None:
    assert read_counters(VLLM) == {
        "vllm:num_preemptions_total": 5.0,
        'vllm:request_success_total{finished_reason="length"}': 7.0,
        "vllm:time_to_first_token_seconds_count": 4.0,
        "vllm:time_to_first_token_seconds_sum": 1.0,
    }


def test_times_are_those_of_our_requests_alone() -> None:
    counted = between({"vllm:time_to_first_token_seconds_sum": 0.5}, read_counters(VLLM))
    assert engine_times(counted, 4) == {"engine_ttft_s": pytest.approx(0.125)}
    # somebody else asked meanwhile
    assert engine_times(counted, 3) == {}
    assert preemptions(counted) == 5
    assert preemptions({}) is None


def test_without_a_first_reading_nothing_is_counted() -> None:
    counted = between({}, read_counters(VLLM))
    assert counted == {}
    assert preemptions(counted) is None
    assert engine_times(counted, 4) == {}
