"""Simulated sweeps: no case is lost, the bounds of list scheduling hold, and the choice is the scheduler's."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.distribution.affinity import choose
from kvsuite.distribution.simulation import Losses, Simulation, Times

COSTS = st.lists(st.floats(0.1, 100), min_size=1, max_size=40)


def times(costs: list[float], *, sessions: list[int] | None = None, load: float = 0.0) -> Times:
    sessions = sessions or [0] * len(costs)
    return Times(sessions, [costs], [[load] * (max(sessions) + 1)])


@settings(max_examples=150, deadline=None)
@given(COSTS, st.integers(1, 6), st.sampled_from([None, 1000.0, 30.0, 2.0]), st.integers(0, 2**32))
def test_every_case_ends_once_whatever_is_lost(costs: list[float], workers: int, mean: float | None, seed: int) -> None:
    losses = None if mean is None else Losses(mean, away_s=5.0)
    run = Simulation(times(costs), [0] * workers, start_s=2.0, losses=losses, seed=seed).run()
    ran = [case for cases in run.ran for case in cases]
    assert Counter(ran) + Counter(run.crashed) == Counter(range(len(costs)))
    assert len(set(run.repeated)) == len(run.repeated), "a case is given back once"
    assert sum(run.busy_s) <= sum(costs) + 1e-6
    if mean is None:
        assert not run.crashed
        assert not run.repeated
        # list scheduling (Graham 1966): no worker waits while a case does
        best = max(sum(costs) / workers, max(costs))
        assert best - 1e-6 <= run.seconds - 2.0 <= sum(costs) / workers + max(costs) + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 99))
def test_the_choice_is_the_scheduler_s(sessions: list[int], workers: int, seed: int) -> None:
    """The same cases on the same workers, handed out by `choose` over the plain list of what waits."""
    dice = random.Random(seed)
    # no two events at the same time
    costs = [dice.uniform(1, 20) for _ in sessions]
    run = Simulation(times(costs, sessions=sessions, load=0.25), [0] * workers).run()
    waiting, free, last = list(range(len(costs))), [0.0] * workers, [None] * workers
    expected: list[list[int]] = [[] for _ in range(workers)]
    while waiting:
        worker = min(range(workers), key=lambda each: (free[each], each))
        others = [loaded for other, loaded in enumerate(last) if other != worker]
        case = choose(waiting, sessions.__getitem__, last[worker], others)
        waiting.remove(case)
        free[worker] += costs[case] + 0.25 * (last[worker] != sessions[case])
        last[worker] = sessions[case]  # type: ignore[call-overload]
        expected[worker].append(case)
    assert [list(cases) for cases in run.ran] == expected


def test_a_model_is_loaded_once_a_worker_and_again_after_a_loss() -> None:
    sessions = [0] * 20 + [1] * 20
    calm = Simulation(times([10.0] * 40, sessions=sessions, load=30.0), [0, 0]).run()
    assert calm.loads == 2
    assert calm.seconds == 30 + 20 * 10
    lossy = Simulation(times([10.0] * 40, sessions=sessions, load=30.0), [0, 0], losses=Losses(120.0), seed=1).run()
    assert lossy.loads > 2
    assert lossy.seconds > calm.seconds


def test_a_case_runs_where_it_fits() -> None:
    small, large = [1.0, None, 1.0, None], [2.0, 2.0, 2.0, 2.0]
    run = Simulation(Times([0] * 4, [small, large], [[0.0], [0.0]]), [0, 1]).run()
    assert set(run.ran[0]) <= {0, 2}
    # the loss of a host gives a case back to one that had nothing left to do
    for seed in range(20):
        lossy = Simulation(Times([0] * 4, [small, large], [[0.0], [0.0]]), [0, 1], losses=Losses(3.0), seed=seed).run()
        assert set(lossy.ran[0]) <= {0, 2}
        assert Counter(case for cases in lossy.ran for case in cases) + Counter(lossy.crashed) == Counter(range(4))


def test_ten_thousand_cases_with_losses() -> None:
    """What the plan draws; a look at every waiting case for every hand-out would take a minute."""
    dice = random.Random(0)
    sessions = [dice.randrange(20) for _ in range(10_000)]
    costs = [[dice.uniform(5, 60) for _ in sessions] for _ in range(2)]
    run = Simulation(Times(sessions, costs, [[30.0] * 20] * 2), [0] * 8 + [1] * 2, losses=Losses(100 * 3600.0)).run()
    assert sum(map(len, run.ran)) + len(run.crashed) == 10_000
    assert run.loads < 60
