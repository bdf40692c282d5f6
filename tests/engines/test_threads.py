from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kvsuite.engines.threads import choose_threads


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lasts(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves a clock that else stands still: what a step takes does not depend on what the machine does beside it."""
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    return advance


def cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)), raising=False)


@pytest.mark.parametrize("fastest", [1, 2, 4])
def test_the_fastest_count_is_set(
    monkeypatch: pytest.MonkeyPatch, lasts: Callable[[float], None], fastest: int
) -> None:
    cores(monkeypatch, 4)
    tried: list[int] = []

    def step() -> None:
        tried.append(torch.get_num_threads())
        lasts(0.002 if tried[-1] == fastest else 0.02)

    assert choose_threads(step, budget_s=0.0) == fastest
    assert torch.get_num_threads() == fastest
    # one untimed run, then the candidates in turns
    assert tried[1:] == [1, 2, 4] * 3


def test_a_passing_load_does_not_decide(monkeypatch: pytest.MonkeyPatch, lasts: Callable[[float], None]) -> None:
    cores(monkeypatch, 2)
    runs = 0

    def step() -> None:
        nonlocal runs
        runs += 1
        # the better count is slow the first two times it is asked
        slow = torch.get_num_threads() == 1 or runs < 6
        lasts(0.02 if slow else 0.002)

    assert choose_threads(step, budget_s=0.0) == 2


def test_one_core_needs_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 1)
    assert choose_threads(lambda: pytest.fail("nothing to choose between")) == 1


def test_the_probe_lasts_as_long_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 2)
    readings: list[float] = []

    def clock() -> float:
        readings.append(0.01 * len(readings))
        return readings[-1]

    monkeypatch.setattr(time, "perf_counter", clock)
    choose_threads(lambda: None, budget_s=0.2)
    # a round reads the clock five times, and is ended
    assert 0.2 <= readings[-1] <= 0.25
