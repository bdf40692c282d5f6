"""xdist's scheduler with our choice, driven by its own events: workers that run, die and are replaced in any order."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("xdist")
from xdist.remote import Producer

from kvsuite.distribution.scheduler import CaseScheduling


class Worker:
    """What the scheduler sees of one: a queue that it fills, a test that runs when the next is known, or that there is none."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.queue: list[int] = []
        self.shutting_down = False
        self.running: int | None = None
        self.ran: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    def start(self) -> bool:
        """Begin the first test, if a worker of xdist would."""
        if self.running is None and self.queue and (len(self.queue) > 1 or self.shutting_down):
            self.running = self.queue.pop(0)
            return True
        return False


class Desk:
    """Remembers what began and what has a row."""

    def __init__(self, sessions: list[str | None]) -> None:
        self.sessions = sessions
        self.rows: set[str] = set()

    def session_of(self, node_id: str) -> str | None:
        return self.sessions[int(node_id)]

    def has_begun(self, node: Worker, node_id: str) -> bool:
        return node.running == int(node_id)

    def has_row(self, node_id: str) -> bool:
        return node_id in self.rows


class Sweep:
    """A run of xdist without processes."""

    def __init__(self, sessions: list[str | None], workers: int) -> None:
        self.desk = Desk(sessions)
        self.ids = [str(index) for index in range(len(sessions))]
        options = {"tx": ["popen"] * workers, "maxschedchunk": None}
        config: Any = SimpleNamespace(getvalue=options.get, getoption=options.get, hook=None)
        self.scheduler = CaseScheduling(config, Producer("test", enabled=False), self.desk)
        self.done: list[int] = []
        self.crashed: list[str] = []
        self.workers: list[Worker] = []
        for _ in range(workers):
            self.join(schedule=False)
        self.scheduler.schedule()

    def join(self, *, schedule: bool = True) -> Worker:
        worker = Worker(f"gw{len(self.workers)}")
        self.workers.append(worker)
        self.scheduler.add_node(worker)
        self.scheduler.add_node_collection(worker, list(self.ids))
        if schedule:
            self.scheduler.schedule()
        return worker

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker in self.scheduler.nodes]

    def finish(self, worker: Worker) -> None:
        assert worker.running is not None
        index, worker.running = worker.running, None
        self.desk.rows.add(str(index))
        self.done.append(index)
        worker.ran.append(index)
        self.scheduler.mark_test_complete(worker, index, 1.0)

    def die(self, worker: Worker) -> None:
        crashed = self.scheduler.remove_node(worker)
        if crashed is not None:
            self.crashed.append(crashed)
            self.desk.rows.add(crashed)
        self.join()

    def run(self, chance_of_death: float, dice: random.Random) -> None:
        for _ in range(100_000):
            for worker in self.alive:
                worker.start()
            busy = [worker for worker in self.alive if worker.running is not None]
            idle = [worker for worker in self.alive if worker.running is None and not worker.shutting_down]
            if not busy and not idle:
                return
            assert busy, "workers wait for each other"
            worker = dice.choice(busy + idle) if dice.random() < chance_of_death else dice.choice(busy)
            if dice.random() < chance_of_death and len(self.workers) < 300:
                self.die(worker)
            elif worker.running is not None:
                self.finish(worker)
        raise AssertionError("the run does not end")


SESSIONS = st.lists(st.sampled_from(["llama", "qwen", "q4", None]), min_size=1, max_size=40)


@settings(max_examples=150)
@given(SESSIONS, st.integers(1, 5), st.sampled_from([0.0, 0.1, 0.4]), st.integers(0, 2**32))
def test_every_test_ends_once_whoever_dies(sessions: list[str | None], workers: int, deaths: float, seed: int) -> None:
    if all(session is None for session in sessions):
        # then it is xdist's own, which loses no test either but charges deaths differently
        sessions = ["llama", *sessions]
    sweep = Sweep(sessions, workers)
    sweep.run(deaths, random.Random(seed))
    ended = Counter(map(str, sweep.done)) + Counter(sweep.crashed)
    assert ended == Counter(sweep.ids)
    if deaths == 0:
        assert not sweep.crashed


def test_models_stay_on_their_worker_and_a_lone_one_is_shared() -> None:
    sweep = Sweep(["llama"] * 6 + ["qwen"] * 6, 2)
    sweep.run(0.0, random.Random(1))
    for worker in sweep.workers:
        models = [sweep.desk.sessions[index] for index in worker.ran]
        changes = sum(a != b for a, b in itertools.pairwise(models))
        assert changes <= 1
        assert worker.ran
    shared = Sweep(["llama"] * 8, 2)
    for _ in range(4):
        for worker in shared.alive:
            worker.start()
        for worker in shared.alive:
            shared.finish(worker)
    assert [len(worker.ran) for worker in shared.workers] == [4, 4]


def test_a_worker_that_dies_between_cases_costs_none() -> None:
    sweep = Sweep(["llama"] * 4, 1)
    (worker,) = sweep.alive
    worker.start()
    sweep.finish(worker)
    sweep.die(worker)
    assert sweep.crashed == []
    sweep.run(0.0, random.Random(0))
    assert sorted(sweep.done) == [0, 1, 2, 3]


def test_a_death_after_the_row_was_written_costs_none() -> None:
    sweep = Sweep(["llama"] * 3, 1)
    (worker,) = sweep.alive
    worker.start()
    sweep.desk.rows.add("0")
    sweep.die(worker)
    assert sweep.crashed == []
    sweep.run(0.0, random.Random(0))
    assert sorted(sweep.done) == [1, 2]


def test_without_cases_it_is_xdists_own() -> None:
    sweep = Sweep([None] * 10, 2)
    # a quarter of what each will get, at least two
    assert [len(worker.queue) for worker in sweep.workers] == [2, 2]
    worker = sweep.workers[0]
    worker.start()
    assert sweep.scheduler.remove_node(worker) == "0"
