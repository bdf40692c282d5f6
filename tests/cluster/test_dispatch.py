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
from kvsuite.cluster.orders import CaseAnswer, Node, Order, Ready
from kvsuite.cluster.reference import Reference, of_controller, of_earlier
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
        #: workers that never begin, and nodes that answer with an error of use
        self.hangs: set[int] = set()
        self.complaining: set[str] = set()
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

    def news(self, timeout_s: float) -> tuple[int, Ready | CaseAnswer | Lost] | None:
        speaks = [worker for worker in self.queue if worker not in self.hangs]
        if not speaks:
            return None
        worker = self.random.choice(sorted(speaks)) if self.draws else speaks[0]
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
        if fate in ("dead", "away"):
            return worker, Lost(False, fate, is_unbegun=fate == "dead", is_out_of_reach=fate == "away")
        if home.name in self.complaining:
            return worker, CaseAnswer(None, None, environment(), usage_error="the disk is full")
        return worker, CaseAnswer({"id": order.id, "status": fate}, None, environment())

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)
        self.queue.pop(worker, None)


def dispatched(cluster: Cluster, asked: list[Order], **more: Any) -> tuple[list[Finished], list[str]]:
    told: list[str] = []
    clock = iter(range(10**9))
    given = {"footprints": {}, "code": CODE} | more
    dispatch = Dispatch(cluster, asked, default_options(), tell=told.append, now=lambda: float(next(clock)), **given)
    return list(dispatch.rows(lambda: None)), told


@settings(max_examples=100)
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


def test_a_case_waits_for_the_card_that_is_still_starting() -> None:
    big, small = ready(memory_bytes=141 * GIB), ready(memory_bytes=48 * GIB)
    cluster = Cluster([node("small"), node("big")], readiness=lambda home: big if home.name == "big" else small)
    cluster.draws = False
    asked = orders(1)
    dispatched(cluster, asked, footprints={asked[0].id: Footprint(bytes=100 * GIB, is_whole=True)})
    assert cluster.began == [(asked[0].id, "big")]


def test_a_case_waits_for_the_card_that_takes_a_lost_ones_place() -> None:
    big, small = ready(memory_bytes=141 * GIB), ready(memory_bytes=48 * GIB)
    cluster = Cluster([node("big"), node("small")], readiness=lambda home: big if home.name == "big" else small)
    cluster.draws = False
    asked = orders(3)
    cluster.fate = lambda order: "worker" if order is asked[0] else "ok"
    needs = {order.id: Footprint(bytes=100 * GIB, is_whole=True) for order in asked}
    dispatched(cluster, asked, footprints=needs)
    assert {home for _, home in cluster.began} == {"big"}
    # a host that was lost may come back, and is waited for as long as it is suspect
    cluster = Cluster([node("big"), node("small")], readiness=lambda home: big if home.name == "big" else small)
    cluster.draws = False

    def fate(order: Order) -> str:
        if order is asked[0] and not cluster.kills:
            cluster.up.append(Node("id-again", "big", "10.0.0.1", 1))
            return "node"
        return "ok"

    cluster.fate = fate
    dispatched(cluster, asked, footprints=needs)
    assert {home for _, home in cluster.began} == {"big"}


def test_a_case_goes_where_its_engine_is() -> None:
    without = ready(unusable=frozenset({("e", "cpu")}))
    cluster = Cluster(
        [node("without"), node("with")], readiness=lambda home: without if home.name == "without" else ready()
    )
    cluster.draws = False
    dispatched(cluster, orders(4))
    assert {home for _, home in cluster.began} == {"with"}
    # what has its engine nowhere is given to somebody, and its row says so
    cluster = Cluster([node("without")], readiness=lambda _: without)
    assert len(dispatched(cluster, orders(2))[0]) == 2


def test_engines_that_the_first_node_lacks_are_compared_between_the_others() -> None:
    def having(name: str) -> Ready:
        engines = {"a": {}, "b": {"v": {"v": "1"}}, "c": {"v": {"v": "2"}}}[name]
        return ready(environment=environment() | {"engines": engines})

    cluster = Cluster([node("a"), node("b"), node("c")], readiness=lambda home: having(home.name))
    cluster.draws = False
    _, told = dispatched(cluster, orders(6))
    (line,) = [line for line in told if "left out" in line]
    assert line.startswith("kvsuite: node c ")
    assert line.endswith("v of engine v: then 1, now 2")


def test_nodes_lost_with_the_last_case_do_not_end_a_run_that_is_over() -> None:
    cluster = Cluster([node("a"), node("b")])
    cluster.fate = lambda order: "node"
    found, _ = dispatched(cluster, orders(1))
    assert [one.answer.record["status"] for one in found if one.answer.record] == ["crashed"]


def test_the_controllers_versions_decide_and_not_who_answers_first() -> None:
    odd = ready(environment=environment(torch="2.12.0+cu128"))
    cluster = Cluster([node("odd"), node("a")], readiness=lambda home: odd if home.name == "odd" else ready())
    cluster.draws = False
    own = Reference("the controller", {"python": "3.11.2", "packages": {"torch": "2.11.0+cpu"}}, is_build_free=True)
    _, told = dispatched(cluster, orders(4), reference=own)
    assert {home for _, home in cluster.began} == {"a"}
    (line,) = [line for line in told if "left out" in line]
    assert line.endswith("other software than the controller: torch: then 2.11.0, now 2.12.0")


def test_a_run_that_goes_on_names_the_software_of_its_nodes() -> None:
    known = environment(torch="2.12.0") | {"gpu": {}}
    earlier = of_earlier({"environment": environment(), "sessions": [{"environment": known}]})
    assert earlier.differences(environment(torch="2.12.0")) == ["torch: then 2.11.0, now 2.12.0"]
    only_later = {key: value for key, value in environment().items() if key != "gpu"}
    earlier = of_earlier({"environment": only_later, "sessions": [{"environment": known}]})
    assert earlier.differences(environment(torch="2.12.0")) == [], "that of its first worker"
    assert of_controller().differences(environment(torch="0.1", transformers="0.1"))[0].startswith("torch: then ")


def test_a_case_that_a_dead_worker_never_began_is_given_again_and_has_no_mark() -> None:
    cluster = Cluster([node("a")])
    fates = iter(["dead", "dead", "ok"])
    cluster.fate = lambda order: next(fates)
    ((one,), _) = dispatched(cluster, orders(1))
    assert one.answer.record is not None
    assert one.answer.record["status"] == "ok"
    assert one.order.lost_on == []
    # not for ever
    cluster = Cluster([node("a")])
    cluster.fate = lambda order: "dead"
    ((one,), _) = dispatched(cluster, orders(1))
    assert one.answer.record is not None
    assert one.answer.record["error"]["type"] == "worker lost"


def test_a_worker_out_of_reach_gives_its_case_back_and_its_node_goes_on() -> None:
    cluster = Cluster([node("a")])
    fates = iter(["away", "ok"])
    cluster.fate = lambda order: next(fates)
    ((one,), told) = dispatched(cluster, orders(1))
    assert one.answer.record is not None
    assert (one.answer.record["status"], len(one.order.lost_on)) == ("ok", 1)
    assert told == [], "the node is not gone"


def test_company_is_the_most_that_measured_or_started_meanwhile() -> None:
    cluster = Cluster([node("a", 3)])
    cluster.draws = False
    found, _ = dispatched(cluster, orders(4))
    assert [one.workers for one in found] == [3, 3, 3, 3], "the last one too began beside two"
    cluster = Cluster([node("a", 3)])
    found, _ = dispatched(cluster, orders(1))
    assert [one.workers for one in found] == [3], "two others started beside it"


def test_one_worker_that_does_not_begin_costs_its_slot_and_not_its_node() -> None:
    cluster = Cluster([node("a", 3)])
    cluster.hangs = {2}
    found, told = dispatched(cluster, orders(400))
    assert len(found) == 400
    assert cluster.stopped == [2]
    assert len(cluster.homes) == 3, "no other takes its place"
    (line,) = told
    assert line.endswith("has one worker less: it has not begun within 300 s: another job may hold its GPU or cores")
    cluster = Cluster([node("a", 2)])
    cluster.hangs = {1, 2}
    with pytest.raises(UserError, match=r"no node can measure: node a .*it has not begun within 300 s"):
        dispatched(cluster, orders(1))


def test_what_one_node_lacks_leaves_it_out_and_what_two_lack_ends_the_run() -> None:
    cluster = Cluster([node("full"), node("a"), node("b")])
    cluster.complaining = {"full"}
    found, told = dispatched(cluster, orders(6))
    assert all(one.answer.usage_error is None for one in found)
    assert len(found) == 6
    (line,) = [line for line in told if "left out" in line]
    assert line == "kvsuite: node full (10.0.0.1, id-full) is left out: the disk is full"
    cluster = Cluster([node("full"), node("a")])
    cluster.complaining = {"full", "a"}
    found, _ = dispatched(cluster, orders(6))
    assert found[0].answer.usage_error == "the disk is full"
    alone = Cluster([node("full")])
    alone.complaining = {"full"}
    assert dispatched(alone, orders(1))[0][0].answer.usage_error == "the disk is full"
