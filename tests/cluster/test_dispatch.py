"""Who gets which case, on hosts that die, refuse and come back as a test draws it: each case has one row in the end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.case import Case
from kvsuite.cluster.dispatch import Dispatch, Finished
from kvsuite.cluster.hands import Lost
from kvsuite.cluster.orders import Answer, Node, Order, Ready
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.suites.footprint import Footprint

CODE = {"kvsuite": "sha256:1"}
GIB = 1 << 30


def environment(**packages: str) -> dict[str, Any]:
    return {
        "host": {"name": "h", "os": "Linux", "cpu": "c", "cores": 2}, "gpu": {}, "python": "3.11.7",
        "packages": {"torch": "2.11.0"} | packages, "engines": {},
    }  # fmt: skip


def ready(**changed: Any) -> Ready:
    return Ready(**{"environment": environment(), "code": CODE, "memory_bytes": 16 * GIB, "gpu": None} | changed)


def node(name: str, slots: int = 1) -> Node:
    return Node(f"id-{name}", name, "10.0.0.1", slots)


def orders(count: int, models: int = 1) -> list[Order]:
    return [
        Order(Case("s", "e", f"m{index * models // count}", f"c{index}", "cpu", "float32"), f"t[c{index}]", index)
        for index in range(count)
    ]


class Cluster:
    """Hands whose events a test draws: ``fate(worker's node, order)`` is an answer's status, or how the worker is lost."""

    def __init__(
        self, nodes: Sequence[Node], seed: int = 0, readiness: Callable[[Node], Ready | Lost] | None = None
    ) -> None:
        self.up = list(nodes)
        self.random = random.Random(seed)
        self.readiness = readiness or (lambda _: ready())
        self.homes: dict[int, Node] = {}
        self.queue: dict[int, Order | None] = {}
        self.began: list[tuple[str, str]] = []
        self.kills = 0
        #: whether news come in any order, or in that in which they were asked for
        self.draws = True
        self.stopped: list[int] = []
        self.fate: Callable[[Order], str] = lambda _: "ok"

    def nodes(self) -> Sequence[Node]:
        return list(self.up)

    def start(self, node: Node) -> int:
        number = len(self.homes) + 1
        self.homes[number], self.queue[number] = node, None
        return number

    def give(self, worker: int, order: Order) -> None:
        assert worker not in self.queue, "one case at a time"
        self.began.append((order.id, self.homes[worker].name))
        self.queue[worker] = order

    def news(self, timeout_s: float) -> tuple[int, Ready | Answer | Lost] | None:
        if not self.queue:
            return None
        worker = self.random.choice(sorted(self.queue)) if self.draws else next(iter(self.queue))
        order, home = self.queue.pop(worker), self.homes[worker]
        if home not in self.up:
            return worker, Lost(True, "gone")
        if order is None:
            return worker, self.readiness(home)
        fate = self.fate(order)
        if fate == "node":
            self.kills += 1
            self.up.remove(home)
            return worker, Lost(True, "gone")
        if fate == "worker":
            self.kills += 1
            return worker, Lost(False, "End of file")
        return worker, Answer({"id": order.id, "status": fate}, None, environment())

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)
        self.queue.pop(worker, None)


def dispatched(cluster: Cluster, asked: list[Order], **more: Any) -> tuple[list[Finished], list[str]]:
    told: list[str] = []
    clock = iter(range(10**9))
    given = {"footprints": {}, "code": CODE} | more
    dispatch = Dispatch(cluster, asked, default_options(), tell=told.append, now=lambda: float(next(clock)), **given)
    return list(dispatch.rows(lambda: None)), told


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 40), slots=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    models=st.integers(1, 3), share=st.floats(0, 0.3),
)  # fmt: skip
def test_every_case_has_one_row_and_a_kill_repeats_one_at_most(
    seed: int, count: int, slots: list[int], models: int, share: float
) -> None:
    asked = orders(count, models)
    cluster = Cluster([node(f"n{index}", size) for index, size in enumerate(slots)], seed)

    def fate(order: Order) -> str:
        drawn = cluster.random.random()
        # one node stays
        if drawn < share / 3 and len(cluster.up) > 1:
            return "node"
        return "worker" if drawn < share else "ok"

    cluster.fate = fate
    found, _ = dispatched(cluster, asked)
    assert Counter(one.order.id for one in found) == Counter(order.id for order in asked)
    times = Counter(name for name, _ in cluster.began)
    assert max(times.values()) <= 2, "a case is given back once"
    # a node takes one case of each of its workers with it
    assert sum(times.values()) - count <= cluster.kills * max(slots)
    for one in found:
        assert one.answer.record is not None
        assert one.answer.record["status"] in ("ok", "crashed")


def test_a_case_goes_back_when_its_node_dies_and_crashes_when_the_second_does() -> None:
    cluster = Cluster([node("a"), node("b"), node("c")])
    fates = iter(["node", "node", "ok"])
    cluster.fate = lambda order: next(fates) if order.id == "t[c0]" else "ok"
    found, told = dispatched(cluster, orders(1))
    assert [name for name, _ in cluster.began] == ["t[c0]", "t[c0]"]
    (one,) = found
    assert one.answer.record is not None
    assert one.answer.record["status"] == "crashed"
    assert one.answer.record["error"]["type"] == "node lost"
    assert one.answer.record["reason"].count("10.0.0.1") == 2, "both are named"
    assert sum("is gone" in line for line in told) == 2


def test_a_dead_worker_crashes_its_case_and_another_takes_its_place() -> None:
    cluster = Cluster([node("a")])
    cluster.fate = lambda order: "worker" if order.id == "t[c0]" else "ok"
    found, _ = dispatched(cluster, orders(3))
    status = {one.order.id: one.answer.record["status"] for one in found if one.answer.record}
    assert status == {"t[c0]": "crashed", "t[c1]": "ok", "t[c2]": "ok"}
    assert len(cluster.homes) == 2


def test_models_stay_together() -> None:
    cluster = Cluster([node("a"), node("b")], seed=3)
    asked = orders(20, models=2)
    dispatched(cluster, asked)
    models = {order.id: order.case.model for order in asked}
    loads = 0
    for name in ("a", "b"):
        there = [models[one] for one, home in cluster.began if home == name]
        loads += sum(before != after for before, after in zip([None, *there], there, strict=False))
    assert loads <= 3, "each model once, and one that has nothing left helps the other"


def test_the_row_is_there_before_its_worker_gets_another() -> None:
    cluster = Cluster([node("a")])
    dispatch = Dispatch(cluster, orders(5), default_options(), CODE, {}, lambda _: None)
    for written, _ in enumerate(dispatch.rows(lambda: None)):
        assert len(cluster.began) == written + 1


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (ready(code={"kvsuite": "sha256:2"}), "its code of kvsuite is not the controller's"),
        (ready(environment=environment(torch="2.12.0")), "torch: then 2.11.0, now 2.12.0"),
        (ready(refusal="--kv-model=/m: there is no such folder"), "--kv-model=/m: there is no such folder"),
    ],
    ids=["kvsuite", "torch", "model"],
)
def test_a_node_that_cannot_measure_alike_is_left_out_by_name(odd: Ready, reason: str) -> None:
    cluster = Cluster([node("a"), node("odd", 2)], readiness=lambda home: odd if home.name == "odd" else ready())
    # the first that answers is who others are compared with
    cluster.draws = False
    found, told = dispatched(cluster, orders(4))
    assert {home for _, home in cluster.began} == {"a"}
    assert len(found) == 4
    (line,) = [line for line in told if "left out" in line]
    assert line.startswith("kvsuite: node odd (10.0.0.1, id-odd) is left out: ")
    assert line.endswith(reason)


def test_a_node_with_another_driver_is_used_and_marked() -> None:
    def gpu(driver: str) -> Ready:
        return ready(environment=environment() | {"gpu": {"name": "H200", "driver": driver}})

    cluster = Cluster([node("a"), node("b")], readiness=lambda home: gpu("580" if home.name == "a" else "570"))
    cluster.draws = False
    found, told = dispatched(cluster, orders(6))
    assert len(found) == 6
    assert told == [
        "kvsuite: node b (10.0.0.1, id-b) is another machine than a (10.0.0.1, id-a): gpu driver: then 580, now 570"
    ]


def test_a_case_goes_where_it_has_room() -> None:
    big, small = ready(memory_bytes=141 * GIB), ready(memory_bytes=48 * GIB)
    cluster = Cluster([node("big"), node("small")], readiness=lambda home: big if home.name == "big" else small)
    asked = orders(6)
    needs = {
        asked[2].id: Footprint(bytes=100 * GIB, is_whole=True),
        asked[4].id: Footprint(bytes=200 * GIB, is_whole=True),
    }
    found, _ = dispatched(cluster, asked, footprints=needs)
    assert len(found) == 6
    homes = dict(cluster.began)
    assert homes[asked[2].id] == "big"
    assert asked[4].id in homes, "what has room nowhere is tried, and its row says so"


def test_without_a_node_that_can_measure_the_run_ends_in_one_line() -> None:
    with pytest.raises(UserError, match="no node has a GPU or as many cores"):
        dispatched(Cluster([]), orders(1))
    refused = Cluster([node("a")], readiness=lambda _: ready(refusal="no CUDA here"))
    with pytest.raises(UserError, match=r"no node can measure: node a \(10.0.0.1, id-a\): no CUDA here"):
        dispatched(refused, orders(1))
    failing = Cluster([node("a")], readiness=lambda _: Lost(False, "exit code 1"))
    with pytest.raises(UserError, match="no worker starts there: exit code 1"):
        dispatched(failing, orders(1))


def test_the_last_node_takes_the_run_with_it() -> None:
    cluster = Cluster([node("a")])
    cluster.fate = lambda order: "node"
    with pytest.raises(UserError, match="no node is left; add nodes and go on with --kv-resume=latest"):
        dispatched(cluster, orders(2))


def test_nodes_that_come_later_get_work() -> None:
    cluster = Cluster([node("a")])

    def fate(order: Order) -> str:
        if order.id == "t[c1]":
            cluster.up.append(node("late"))
        return "ok"

    cluster.fate = fate
    dispatched(cluster, orders(30))
    assert {home for _, home in cluster.began} == {"a", "late"}
