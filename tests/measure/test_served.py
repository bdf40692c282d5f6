"""What is written of requests under load, by a server whose times and tokens are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from kvsuite.engines.results import RequestServed, Served, StepServed
from kvsuite.measure.energy import RoundEnergy
from kvsuite.measure.measurement import Measurement
from kvsuite.measure.served import put_compression, put_served, request_rows, sm_seconds, step_columns
from kvsuite.meters.energy import Energy
from kvsuite.meters.serving_times import Slo
from kvsuite.metrics.registry import MetricRegistry

SLO = Slo(1.0, 0.025)
#: of the double: seconds to the first token and to each further one, by request
TTFT, TPOT, TOKENS, PROMPT, CACHED = 0.25, 0.0125, 9, 64, 48


def served(count: int, *, gap: float = 0.5, slow: Sequence[int] = (), late: Sequence[int] = ()) -> Served:
    """Every ``gap`` s a request that waits 0.125 s; half of them hit the cache. Some decode slowly, some start late."""
    requests = []
    for index in range(count):
        at, first = gap * index, TTFT + (index in late)
        tpot = TPOT * (4 if index in slow else 1)
        times = [at + first + tpot * number for number in range(TOKENS)]
        cached = CACHED if index % 2 else 0
        requests.append(RequestServed(at, at + 0.125, times, PROMPT, cached, PROMPT - cached, index % 3, 20.0, 52.0))
    computed = sum(one.computed_prompt_tokens for one in requests)
    counts = {"computed_prefill_tokens": computed, "computed_decode_tokens": count * (TOKENS - 1)}
    # one of two running for a tenth of the time
    steps = [StepServed("prompt", 0.0, 0.9, 64, 0, 1, 3, 8), StepServed("decode", 0.9, 1.0, 0, 2, 2, 0, 10)]
    return Served([], [[1] * TOKENS] * count, counts, requests=requests, steps=steps)


def written(*rounds: Served, **options: Any) -> Measurement:
    found = Measurement(MetricRegistry())
    put_served(found, rounds, SLO, **options)
    return found


def values(found: Measurement) -> dict[str, float | None]:
    return {name: entry["value"] for name, entry in found.metrics.items()}


def test_throughputs_and_goodput_of_a_round() -> None:
    found = written(served(20, slow=[3], late=[4, 5]))
    wall = 19 * 0.5 + TTFT + (TOKENS - 1) * TPOT
    of = values(found)
    assert of["output_tok_s"] == pytest.approx(20 * TOKENS / wall)
    # ten of twenty prompts were found in the cache but for 16 tokens, and no first token is fed
    assert of["total_tok_s_computed"] == pytest.approx((10 * 64 + 10 * 16 + 20 * 8) / wall)
    assert of["total_tok_s_logical"] == pytest.approx(20 * (64 + 9) / wall)
    assert of["goodput_req_s"] == pytest.approx(17 / wall)
    assert of["slo_share"] == pytest.approx(0.85)
    assert found.metrics["goodput_req_s"]["slo"] == "1s:25ms"
    assert of["preemptions"] == sum(index % 3 for index in range(20))
    assert of["running_mean"] == pytest.approx(1.1)
    assert of["blocks_peak"] == 10
    assert found.tokens == {
        "requests": 20, "prompt": 1280, "prefill_computed": 800, "decode_computed": 160, "prefix_hits": 480,
        "generated": 180,
    }  # fmt: skip
    assert {entry["clock"] for entry in found.metrics.values()} == {"delivery"}


def test_cached_tokens_are_no_throughput() -> None:
    """What the prefix cache gave is told apart: to count it as computed makes identical prompts look several times as fast."""
    of = values(written(served(20)))
    assert of["total_tok_s_computed"] is not None
    assert of["total_tok_s_logical"] is not None
    assert of["total_tok_s_logical"] / of["total_tok_s_computed"] == pytest.approx(1460 / 960)


def test_latencies_have_the_percentiles_that_their_number_bears() -> None:
    found = written(served(20, late=[19]))
    of = values(found)
    assert of["ttft_p50_s"] == pytest.approx(TTFT)
    assert of["ttft_p90_s"] == pytest.approx(TTFT)
    assert of["ttft_p99_s"] is None
    assert found.metrics["ttft_p99_s"]["reason"] == "20 samples; a p99 takes 100"
    assert of["tpot_p50_s"] == pytest.approx(TPOT)
    # gaps are pooled: 160 of them bear a p99
    assert of["itl_p99_s"] == pytest.approx(TPOT)
    assert found.metrics["itl_p99_s"]["pooled_n"] == 160
    assert of["queue_p50_s"] == pytest.approx(0.125)


def test_rounds_are_samples_where_each_has_enough_and_are_pooled_where_not() -> None:
    found = written(served(60), served(60, late=range(60)))
    assert found.metrics["ttft_p50_s"]["values"] == pytest.approx([TTFT, TTFT + 1])
    # what comparisons find pooled has no spread, and is told as information whatever it is
    for name in ("ttft_p50_s", "tpot_p90_s", "itl_p99_s", "queue_p50_s"):
        assert "pooled" not in found.metrics[name], name
    # 60 requests bear no p99, and 120 do
    assert found.metrics["ttft_p99_s"]["value"] == pytest.approx(TTFT + 1)
    assert (found.metrics["ttft_p99_s"]["pooled"], found.metrics["ttft_p99_s"]["pooled_n"]) == ("all rounds", 120)
    assert len(found.metrics["output_tok_s"]["values"]) == 2


def test_sm_seconds_are_those_that_the_lanes_own() -> None:
    one = served(4)
    assert sm_seconds(one.steps, {"prompt": 64, "decode": 32}) == pytest.approx(0.9 * 64 + 0.1 * 32)
    assert values(written(one, sms={"prompt": 64, "decode": 32}))["sm_seconds"] == pytest.approx(60.8)
    found = written(one)
    assert found.metrics["sm_seconds"]["value"] is None
    assert "no partition" in found.metrics["sm_seconds"]["reason"]


def test_steps_that_overlap_count_their_time_once() -> None:
    one = served(4)
    beside = [
        StepServed("prompt", 0.0, 0.9, 64, 0, 3, 0, 8),
        StepServed("decode", 0.0, 0.3, 0, 1, 1, 0, 8),
        StepServed("decode", 0.3, 0.6, 0, 1, 1, 0, 8),
    ]
    found = values(written(replace(one, steps=beside), sms={"prompt": 100, "decode": 10}))
    assert found["running_mean"] == pytest.approx((0.3 * 1 + 0.3 * 1 + 0.3 * 3) / 0.9)
    assert found["sm_seconds"] == pytest.approx(0.9 * 100 + 0.6 * 10)


def test_a_rate_that_never_drains_is_a_warning() -> None:
    waiting = [
        RequestServed(index * 0.1, index * 0.2, [index * 0.2 + 0.1, index * 0.2 + 0.2], 8, 0, 8, 0, 9.0, 0.0)
        for index in range(100)
    ]
    counts = {"computed_prefill_tokens": 800, "computed_decode_tokens": 100}
    steps = [StepServed("both", 0.0, 1.0, 8, 0, 1, 0, 1)]
    [warning] = written(Served([], [], counts, requests=waiting, steps=steps)).warnings
    assert "this rate never drains" in warning
    assert "found 25 more requests in the system than the first, 50% of those" in warning
    assert "--kv-arrival-rate" in warning
    assert not written(served(100)).warnings


def test_rows_and_columns_for_the_record() -> None:
    one = served(3)
    row = request_rows(one)[1]
    assert row == {
        "arrival_s": 0.5, "admitted_s": 0.625, "ttft_s": TTFT, "tpot_s": pytest.approx(TPOT), "end_s": 0.75 + 8 * TPOT,
        "output_tokens": 9, "prompt_tokens": 64, "cached_tokens": 48, "computed_prompt_tokens": 16, "preemptions": 1,
        "stored_tokens": 20.0, "evicted_tokens": 52.0, "compress_s": None,
    }  # fmt: skip
    assert step_columns(one)["lane"] == ["prompt", "decode"]
    assert step_columns(one)["used_blocks"] == [8, 10]


def test_compression_is_the_mean_over_prompts_that_were_compressed_and_over_rounds() -> None:
    def timed(*seconds: float | None) -> Served:
        one = served(len(seconds))
        return replace(one, requests=[replace(own, compress_s=s) for own, s in zip(one.requests, seconds, strict=True)])

    found = Measurement(MetricRegistry())
    put_compression(found, [timed(0.25, None, 0.75), timed(1.0, 1.0, 1.0)], on_cuda=True, why_not="none")
    entry = found.metrics["compress_prompt_s"]
    assert (entry["values"], entry["prompts"], entry["clock"]) == ([0.5, 1.0], 5, "cuda_event")
    # a round without any has no mean, and the others' would be of other prompts
    put_compression(found, [timed(0.25), timed(None)], on_cuda=False, why_not="the controller chose none")
    entry = found.metrics["compress_prompt_s"]
    assert (entry["value"], entry["reason"]) == (None, "the controller chose none")


class Meter:
    """A card that takes 300 J for 2 s."""

    def start(self) -> None:
        pass

    def stop(self) -> Energy:
        return Energy(300.0, seconds=2.0)


@pytest.mark.parametrize("generated", [50, 0])
def test_energy_of_a_round_and_of_an_output_token(generated: int) -> None:
    found, done = Measurement(MetricRegistry()), []
    if generated:
        found.tokens["generated"] = generated
    energy = RoundEnergy("cuda:0", lambda device: Meter())  # type: ignore[arg-type, return-value]
    energy.metered(lambda round_, rounds: [round_() for _ in range(rounds)] and None)(lambda: done.append(1), 3)
    energy.put(found)
    assert len(done) == 3
    assert found.metrics["energy_j"]["value"] == 100.0
    assert found.metrics["energy_j"]["seconds"] == 2.0
    assert found.metrics["energy_output_token_j"]["value"] == (2.0 if generated else None)
    assert generated or "generate nothing" in found.metrics["energy_output_token_j"]["reason"]


def test_energy_that_is_not_known_has_its_reason() -> None:
    found, energy = Measurement(MetricRegistry()), RoundEnergy("cpu")
    energy.put(found)
    assert not found.metrics, "nothing was timed"
    energy.metered(lambda round_, rounds: round_())(lambda: None, 1)
    energy.put(found)
    for name in ("energy_j", "energy_output_token_j"):
        assert (found.metrics[name]["value"], found.metrics[name]["reason"]) == (None, "NVML knows no cpu device")


def test_of_a_server_that_tells_of_no_steps_and_no_admission() -> None:
    whole = served(4)
    apart = [
        replace(one, admitted_s=None, cached_tokens=None, computed_prompt_tokens=None, preemptions=None)
        for one in whole.requests
    ]
    found = written(replace(whole, requests=apart, steps=[], counts={"preemptions": 5}))
    of = values(found)
    for name in ("output_tok_s", "total_tok_s_logical", "goodput_req_s", "ttft_p50_s"):
        assert of[name] == pytest.approx(values(written(whole))[name]), name
    assert of["preemptions"] == 5
    for name, reason in (
        ("total_tok_s_computed", "the engine does not count them"),
        ("running_mean", "the engine tells of no steps"),
        ("blocks_peak", "the engine tells of no steps"),
        ("queue_p90_s", "the engine does not tell when it takes a request up"),
    ):
        assert of[name] is None
        assert found.metrics[name]["reason"] == reason
    assert found.tokens == {"requests": 4, "prompt": 4 * PROMPT, "generated": 4 * TOKENS}
