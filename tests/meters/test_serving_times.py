"""Formulas of requests under load, by scripted times: SLO, percentiles, goodput, and queues that grow for good."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.meters.serving_times import (
    LoadTimes,
    Slo,
    backlog,
    goodput,
    percentiles,
    time_mean,
    too_few,
    wall_s,
)

SLO = Slo(1.0, 0.025)


def request(
    arrival: float, first: float, gap: float = 0.01, tokens: int = 5, admitted: float | None = None
) -> LoadTimes:
    at = arrival + first
    return LoadTimes(arrival, arrival if admitted is None else admitted, [at + gap * index for index in range(tokens)])


def test_times_of_a_request() -> None:
    one = LoadTimes(2.0, 2.5, [3.0, 3.25, 4.0])
    assert (one.ttft_s, one.e2e_s, one.queue_s, one.tpot_s) == (1.0, 2.0, 0.5, 0.5)
    assert one.itl_s == [0.25, 0.75]
    alone = LoadTimes(2.0, 2.0, [3.0])
    assert alone.tpot_s is None
    assert alone.itl_s == []


def test_who_meets_the_slo() -> None:
    requests = [
        request(0.0, 0.9, 0.02),
        request(0.1, 1.1, 0.02),  # too late
        request(0.2, 0.5, 0.03),  # too slow
        request(0.3, 1.0, 0.01, tokens=1),  # no second token to be late
    ]
    assert [one.meets(SLO) for one in requests] == [True, False, False, True]
    assert wall_s(requests) == pytest.approx(1.3)
    assert goodput(requests, SLO) == (pytest.approx(2 / 1.3), 0.5)


def test_lateness_of_the_loop_counts() -> None:
    """Taken up half a second late: due is due."""
    late = request(1.0, 1.4, admitted=1.5)
    assert not late.meets(SLO)
    assert late.queue_s == 0.5


@pytest.mark.parametrize(
    ("text", "ttft", "tpot"),
    [("1s:25ms", 1.0, 0.025), ("200ms:12.5ms", 0.2, 0.0125), (" .5s : 900us", 0.5, 0.0009), ("2s:10µs", 2.0, 1e-5)],
)
def test_an_slo_is_read_and_written(text: str, ttft: float, tpot: float) -> None:
    slo = Slo.parse(text)
    assert (slo.ttft_s, slo.tpot_s) == (pytest.approx(ttft), pytest.approx(tpot))
    assert Slo.parse(str(slo)) == slo


@given(st.integers(1, 5000), st.integers(1, 900))
def test_what_an_slo_says_of_itself_is_it(ttft: int, tpot: int) -> None:
    slo = Slo.parse(f"{ttft}ms:{tpot}us")
    again = Slo.parse(str(slo))
    assert (again.ttft_s, again.tpot_s) == (pytest.approx(slo.ttft_s), pytest.approx(slo.tpot_s))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1s", "a bound for TTFT and one for TPOT"), ("", "a bound for TTFT"), ("1s:25ms:3ms", "a bound for TTFT"),
        ("1:25ms", "TTFT '1' is no time"), ("1s:25", "TPOT '25' is no time"), ("1s:-25ms", "TPOT '-25ms' is no time"),
        ("1s:0ms", "must be more than 0"), ("nans:1ms", "TTFT 'nans' is no time"), ("1m:1ms", "TTFT '1m' is no time"),
    ],
)  # fmt: skip
def test_what_is_no_slo_is_a_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        Slo.parse(text)
    assert str(refused.value).startswith(f"--kv-slo={text}: ")
    assert "\n" not in str(refused.value)
    assert "1s:25ms" in str(refused.value)


@pytest.mark.parametrize(
    ("n", "known"), [(1, ""), (2, "p50"), (9, "p50"), (10, "p50 p90"), (99, "p50 p90"), (100, "p50 p90 p99")]
)
def test_a_percentile_takes_its_samples(n: int, known: str) -> None:
    found = percentiles([float(value) for value in range(n)])
    assert [name for name, value in found.items() if value is not None] == known.split()
    at_least = {"p50": 2, "p90": 10, "p99": 100}
    for name in found:
        assert f"{n} samples; a {name} takes {at_least[name]}" == too_few(name, n)


def test_percentiles_lie_between_order_statistics() -> None:
    found = percentiles([float(value) for value in range(101)][::-1])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_a_mean_over_time_is_no_mean_over_steps() -> None:
    assert time_mean([(0.9, 1.0), (0.1, 11.0)]) == pytest.approx(2.0)
    assert time_mean([]) is None


def one_server(arrivals: Iterable[float], served_s: float) -> list[LoadTimes]:
    """First come first served, ``served_s`` a request."""
    found, free = [], 0.0
    for at in arrivals:
        begin = max(at, free)
        free = begin + served_s
        found.append(LoadTimes(at, begin, [begin + served_s / 2, free]))
    return found


def queue(rate: float, served_s: float, count: int, seed: int | None = None) -> list[LoadTimes]:
    """One server; arrivals are even, or Poisson by a seed."""
    draw = random.Random(seed)
    gaps = [1 / rate if seed is None else draw.expovariate(rate) for _ in range(count - 1)]
    return one_server(itertools.accumulate([0.0, *gaps]), served_s)


@pytest.mark.parametrize(("rate", "drains"), [(2.0, True), (9.0, True), (12.0, False), (40.0, False)])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_rate_that_never_drains_is_told(rate: float, drains: bool, seed: int | None) -> None:
    found = backlog(queue(rate, 0.1, 400, seed))
    assert found.drains is drains
    assert found.growth is not None
    if not drains:
        assert "never drains" in found.words
        assert found.growth == pytest.approx(1 - 10 / rate, abs=0.12)


def test_a_burst_at_the_end_is_no_queue_that_grows() -> None:
    """Bursts of 40 in a rate that is served easily, the last one at the end and a pause in the middle."""
    bursts = (0.0, 8.0, 16.0, 40.0, 48.0)
    arrivals = sorted(at for burst in bursts for at in (burst + 0.01 * one for one in range(40)))
    assert backlog(one_server(arrivals, 0.1)).drains is True
    # the same requests where each burst meets what the last one left
    assert backlog(one_server(arrivals, 0.4)).drains is False


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        (queue(5.0, 0.1, 8), "8 arrivals at 8 times are too few"),
        ([request(0.0, 1.0)] * 50, "50 arrivals at one time are too few"),
        (queue(100.0, 5.0, 50), "too short to see a queue grow"),
    ],
)
def test_too_short_a_run_says_nothing_of_a_queue(requests: list[LoadTimes], said: str) -> None:
    found = backlog(requests)
    assert (found.drains, found.growth) == (None, None)
    assert said in found.words
