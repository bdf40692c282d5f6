"""Capacity by bisection, on servers whose capacity is known."""

from __future__ import annotations

import pytest

from kvsuite.meters.capacity import Attempt, Capacity, attempt_of, find_capacity
from kvsuite.meters.serving_times import LoadTimes, Slo

SLO = Slo(1.0, 0.025)
TTFT, TPOT, TOKENS = 0.2, 0.01, 81
HELD_S = TTFT + (TOKENS - 1) * TPOT


def double(rate: float, *, places: int, count: int, tpot: float = TPOT) -> list[LoadTimes]:
    """A server of ``places`` requests at a time: TTFT and TPOT are what they are, and the rest is waiting."""
    free = [0.0] * places
    found = []
    for index in range(count):
        at = index / rate
        begin = max(at, min(free))
        free[free.index(min(free))] = begin + TTFT + (TOKENS - 1) * tpot
        found.append(LoadTimes(at, begin, [begin + TTFT + tpot * number for number in range(TOKENS)]))
    return found


@pytest.mark.parametrize("places", [1, 4])
def test_the_capacity_of_a_server_that_is_known(places: int) -> None:
    count = 1000
    found = find_capacity(
        lambda rate: attempt_of(rate, double(rate, places=places, count=count), SLO),
        0.05,
        100.0,
        tolerance=0.01,
        most=40,
    )
    # the queue of an endless run grows from `places / HELD_S` on; of this one the 900th request may wait for 0.8 s
    endless = places / HELD_S
    last = 1 / (1 / endless - (SLO.ttft_s - TTFT) / (0.9 * count - places))
    assert found.rate is not None
    assert found.above is not None
    assert endless / 1.01 <= found.rate <= last
    assert found.above / found.rate <= 1.01
    # what is far above is said to never drain, and not only to be slow
    assert found.words is not None
    assert "never drains" in found.words
    assert {one.drains for one in found.attempts if one.rate > 1.3 * endless} == {False}
    assert {one.drains for one in found.attempts if one.rate < 0.9 * endless} == {True}


def test_a_request_that_is_too_slow_alone_has_no_rate() -> None:
    slow = lambda rate: attempt_of(rate, double(rate, places=64, count=50, tpot=0.026), SLO)  # noqa: E731
    found = find_capacity(slow, 0.5, 50.0)
    assert found.rate is None
    assert len(found.attempts) == 1
    assert found.words is not None
    assert found.words.startswith("no rate is good: 0.5 requests a second lets 0% meet the SLO")


def test_a_range_that_ends_too_low_gives_a_bound() -> None:
    found = find_capacity(lambda rate: Attempt(rate, 1.0, True), 1.0, 8.0)
    assert found == Capacity(8.0, None, [Attempt(1.0, 1.0, True), Attempt(8.0, 1.0, True)])
    assert found.words is not None
    assert "at least 8 requests a second" in found.words


@pytest.mark.parametrize(
    ("share", "drains", "good"), [(0.9, True, True), (0.9, None, True), (0.899, True, False), (1.0, False, False)]
)
def test_a_good_rate_serves_nine_of_ten_and_drains(share: float, drains: bool | None, good: bool) -> None:
    assert Attempt(1.0, share, drains).good is good


def test_attempts_are_few() -> None:
    found = find_capacity(lambda rate: Attempt(rate, 1.0 if rate < 3 else 0.0), 0.01, 1000.0, tolerance=1e-9, most=6)
    assert len(found.attempts) == 6
    assert found.rate is not None
    assert found.above is not None
    assert found.rate < 3 <= found.above


@pytest.mark.parametrize("arguments", [(0.0, 1.0), (2.0, 1.0)])
def test_no_range_is_no_bisection(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no bisection"):
        find_capacity(lambda rate: Attempt(rate, 1.0), *arguments)
