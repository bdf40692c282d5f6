from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.workloads.arrivals import mean_rate, poisson_arrivals, trace_arrivals

SEEDS = st.integers(0, 2**32 - 1)
RATES = st.floats(1e-3, 1e3)


@given(count=st.integers(0, 60), more=st.integers(0, 20), rate=RATES, seed=SEEDS)
def test_poisson_arrivals_are_in_order_and_begin_at_once(count: int, more: int, rate: float, seed: int) -> None:
    arrivals = poisson_arrivals(count, rate=rate, seed=seed)
    assert len(arrivals) == count
    assert arrivals == sorted(arrivals)
    assert arrivals[:1] == [0.0] * min(count, 1)
    assert poisson_arrivals(count + more, rate=rate, seed=seed)[:count] == arrivals


@given(rate=RATES, faster=st.floats(1.0, 50.0), seed=SEEDS)
def test_the_gaps_of_a_seed_only_change_their_scale_with_the_rate(rate: float, faster: float, seed: int) -> None:
    slow, fast = (poisson_arrivals(30, rate=each, seed=seed) for each in (rate, rate * faster))
    assert [time * faster for time in fast] == pytest.approx(slow)


def test_poisson_gaps_are_exponential() -> None:
    arrivals = poisson_arrivals(20_001, rate=4.0, seed=3)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.25, rel=0.03)
    assert deviation / mean == pytest.approx(1.0, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.05)
    assert mean_rate(arrivals) == pytest.approx(4.0, rel=0.03)


def test_seeds_differ() -> None:
    assert poisson_arrivals(5, rate=1.0, seed=1) != poisson_arrivals(5, rate=1.0, seed=2)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_never_comes(rate: float) -> None:
    with pytest.raises(UserError, match=r"--kv-arrival-rate=.*above 0"):
        poisson_arrivals(3, rate=rate, seed=0)


def test_trace_arrivals() -> None:
    assert trace_arrivals([100.0, 101.0, 104.0]) == [0.0, 1.0, 4.0]
    assert trace_arrivals([100.0, 101.0, 104.0], time_scale=2.0) == [0.0, 0.5, 2.0]
    # the order is the caller's, the first in time arrives at 0
    assert trace_arrivals([104.0, 100.0], time_scale=0.5) == [8.0, 0.0]
    assert trace_arrivals([]) == []
    with pytest.raises(UserError, match=r"--kv-trace-time-scale=0:.*above 0"):
        trace_arrivals([1.0], time_scale=0.0)


def test_mean_rate() -> None:
    assert mean_rate([0.0, 1.0, 4.0]) == 0.5
    assert mean_rate([0.0, 0.0]) is None
    assert mean_rate([]) is None
