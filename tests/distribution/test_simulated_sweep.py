"""Simulated sweeps: no case is lost, the bounds of list scheduling hold, and the choice is the scheduler's."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.case import Case
from kvsuite.cluster.dispatch import Dispatch
from kvsuite.cluster.orders import CaseAnswer, Node, Order, Ready
from kvsuite.distribution.simulation import Losses, SweepSimulation, Times
from kvsuite.options.resolve import default_options
from kvsuite.suites.footprint import Footprint

COSTS = st.lists(st.floats(0.1, 100), min_size=1, max_size=40)


def times(costs: list[float], *, sessions: list[int] | None = None, load: float = 0.0) -> Times:
    sessions = sessions or [0] * len(costs)
    return Times(sessions, [costs], [[load] * (max(sessions) + 1)])


@settings(max_examples=150)
@given(COSTS, st.integers(1, 6), st.sampled_from([None, 1000.0, 30.0, 2.0]), st.integers(0, 2**32))
def test_every_case_ends_once_whatever_is_lost(costs: list[float], workers: int, mean: float | None, seed: int) -> None:
    losses = None if mean is None else Losses(mean, away_s=5.0)
    run = SweepSimulation(times(costs), [0] * workers, start_s=2.0, losses=losses, seed=seed).run()
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


class TimedHands:
    """A cluster whose cases take what they are expected to, in simulated time."""

    def __init__(
        self, nodes: Sequence[Node], memory: Mapping[str, int], took: Callable[[Node, Order, int], float]
    ) -> None:
        self.now = 0.0
        self.ran: dict[int, list[int]] = {}
        self._nodes, self._memory, self._took = nodes, memory, took
        self._homes: dict[int, Node] = {}
        self._events: list[tuple[float, int, int, Any]] = []

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def start(self, node: Node) -> int:
        number = len(self._homes)
        self._homes[number], self.ran[number] = node, []
        self._push(0.0, number, Ready(ENVIRONMENT, {}, self._memory[node.name], None))
        return number

    def give(self, worker: int, order: Order) -> None:
        self._push(self.now + self._took(self._homes[worker], order, worker), worker, CaseAnswer({}, None, ENVIRONMENT))
        self.ran[worker].append(order.order_index)

    def news(self, timeout_s: float) -> tuple[int, Any]:
        self.now, _, worker, said = heapq.heappop(self._events)
        return worker, said

    def stop(self, worker: int) -> None:
        raise AssertionError("nothing is wrong with it")

    def _push(self, at: float, worker: int, said: Any) -> None:
        heapq.heappush(self._events, (at, len(self._homes) * 1000 + sum(map(len, self.ran.values())), worker, said))


ENVIRONMENT: dict[str, Any] = {
    "host": {"os": "Linux", "cpu": "c", "cores": 2}, "gpu": {}, "python": "3.11.7", "packages": {"torch": "2.11.0"},
    "engines": {},
}  # fmt: skip


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30), st.integers(1, 3), st.integers(0, 2),
    st.integers(0, 99),
)  # fmt: skip
def test_the_simulation_hands_out_what_the_cluster_does(
    cases: list[tuple[int, bool]], large: int, small: int, seed: int
) -> None:
    """The dispatcher of the cluster in the same simulated time: every worker gets the same cases in the same order."""
    dice = random.Random(seed)
    sessions = [session for session, _ in cases]
    # no two events at the same time
    costs = [[dice.uniform(1, 20) for _ in cases] for _ in range(2)]
    for index, (_, is_large) in enumerate(cases):
        if is_large:
            costs[1][index] = None  # type: ignore[call-overload]
    run = SweepSimulation(Times(sessions, costs, [[0.25] * 5] * 2), [0] * large + [1] * small).run()

    nodes = [Node(name, name, "10.0.0.1", slots) for name, slots in (("large", large), ("small", small)) if slots]
    last: dict[int, int] = {}

    def took(node: Node, order: Order, worker: int) -> float:
        session = sessions[order.order_index]
        load = 0.25 * (last.get(worker) != session)
        last[worker] = session
        found: float = costs[node.name == "small"][order.order_index]
        return found + load

    hands = TimedHands(nodes, {"large": 16, "small": 8}, took)
    orders = [
        Order(Case("s", "e", f"m{session}", f"c{index}", "cpu", "float32"), str(index), index)
        for index, session in enumerate(sessions)
    ]
    needs = {str(index): Footprint(1, 1, 12.0 if is_large else 4.0, True) for index, (_, is_large) in enumerate(cases)}
    dispatch = Dispatch(
        hands,
        orders,
        default_options(),
        {},
        needs,
        tell=lambda _: None,
        now=lambda: hands.now,  # type: ignore[arg-type]
    )
    assert len(list(dispatch.rows(lambda: None))) == len(cases)
    assert [list(ran) for ran in run.ran] == [hands.ran[worker] for worker in range(large + small)]


def test_a_model_is_loaded_once_a_worker_and_again_after_a_loss() -> None:
    sessions = [0] * 20 + [1] * 20
    calm = SweepSimulation(times([10.0] * 40, sessions=sessions, load=30.0), [0, 0]).run()
    assert calm.loads == 2
    assert calm.seconds == 30 + 20 * 10
    lossy = SweepSimulation(
        times([10.0] * 40, sessions=sessions, load=30.0), [0, 0], losses=Losses(120.0), seed=1
    ).run()
    assert lossy.loads > 2
    assert lossy.seconds > calm.seconds


def test_a_case_runs_where_it_fits() -> None:
    small, large = [1.0, None, 1.0, None], [2.0, 2.0, 2.0, 2.0]
    run = SweepSimulation(Times([0] * 4, [small, large], [[0.0], [0.0]]), [0, 1]).run()
    assert set(run.ran[0]) <= {0, 2}
    # the loss of a host gives a case back to one that had nothing left to do
    for seed in range(20):
        lossy = SweepSimulation(
            Times([0] * 4, [small, large], [[0.0], [0.0]]), [0, 1], losses=Losses(3.0), seed=seed
        ).run()
        assert set(lossy.ran[0]) <= {0, 2}
        assert Counter(case for cases in lossy.ran for case in cases) + Counter(lossy.crashed) == Counter(range(4))


def test_ten_thousand_cases_with_losses() -> None:
    """What the plan draws; a look at every waiting case for every hand-out would take a minute."""
    dice = random.Random(0)
    sessions = [dice.randrange(20) for _ in range(10_000)]
    costs = [[dice.uniform(5, 60) for _ in sessions] for _ in range(2)]
    run = SweepSimulation(
        Times(sessions, costs, [[30.0] * 20] * 2), [0] * 8 + [1] * 2, losses=Losses(100 * 3600.0)
    ).run()
    assert sum(map(len, run.ran)) + len(run.crashed) == 10_000
    assert run.loads < 60
