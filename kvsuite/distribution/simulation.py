"""A sweep on workers that are not there: the scheduler's choice under expected times, and drawn losses."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .affinity import wanted_session


@dataclass(frozen=True)
class Times:
    """What cases are expected to take on each kind of card.

    Parameters
    ----------
    sessions
        A number for each case: those with the same one share what is loaded.
    seconds
        ``[card][case]`` without loading; ``None`` where the case does not fit the card.
    load_s
        ``[card][session]``: loading for it.
    """

    sessions: Sequence[int]
    seconds: Sequence[Sequence[float | None]]
    load_s: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Losses:
    """What goes wrong.

    Parameters
    ----------
    mean_s
        Mean seconds between two losses of one worker (exponential: a worker does not age).
    hosts
        Share of them in which its host is lost too, in [0, 1]: then the case is given back, once, as the cluster does. In the
        others the case has crashed. Which workers share a host is not known: each is taken to have one of its own.
    away_s
        Seconds until a lost host is back.
    """

    mean_s: float
    hosts: float = 0.5
    away_s: float = 600.0


@dataclass(frozen=True)
class SimulatedRun:
    """What became of a simulated sweep.

    Parameters
    ----------
    seconds
        From the start of the workers to the last row.
    busy_s
        Of each worker: measuring and loading what got a row.
    ran
        Cases that got a row, of each worker in order.
    loads
        How often something was loaded.
    crashed
        Cases whose row says that their worker was lost.
    repeated
        Cases that were begun again on another worker.
    """

    seconds: float
    busy_s: tuple[float, ...]
    ran: tuple[tuple[int, ...], ...]
    loads: int
    crashed: tuple[int, ...]
    repeated: tuple[int, ...]


@dataclass
class _Worker:
    card: int
    loaded: int | None = None
    case: int | None = None
    since: float = 0.0
    is_lost: bool = False


class SweepSimulation:
    """One sweep.

    Parameters
    ----------
    times
        Of the cases; each must fit a card that a worker has.
    workers
        Kind of card of each worker.
    start_s
        Seconds until a worker that was started can measure.
    losses
        ``None`` for a sweep in which nothing goes wrong.
    seed
        Of the draws.
    """

    def __init__(
        self,
        times: Times,
        workers: Sequence[int],
        *,
        start_s: float = 0.0,
        losses: Losses | None = None,
        seed: int = 0,
    ) -> None:
        self._times, self._start_s, self._losses = times, start_s, losses
        self._dice = random.Random(seed)
        self._workers = [_Worker(card) for card in workers]
        # by session and by the cards that they fit: to look at all cases for each would take minutes
        self._waiting: dict[tuple[int, tuple[bool, ...]], deque[tuple[int, int]]] = {}
        self._left = len(times.sessions)
        for case, session in enumerate(times.sessions):
            self._waiting.setdefault((session, self._cards_of(case)), deque()).append((case, case))
        self._events: list[tuple[float, int, int]] = []
        self._drawn = self._front = 0
        self._idle: set[int] = set()
        self._busy_s = [0.0] * len(workers)
        self._ran: list[list[int]] = [[] for _ in workers]
        self._loads = 0
        self._crashed: list[int] = []
        self._repeated: list[int] = []

    def run(self) -> SimulatedRun:
        """Let it pass."""
        ended = 0.0
        for number in range(len(self._workers)):
            self._at(self._start_s, number)
        while self._events and (self._left or any(worker.case is not None for worker in self._workers)):
            now, _, number = heapq.heappop(self._events)
            worker = self._workers[number]
            if worker.case is not None:
                if self._ends(now, number, worker):
                    ended = now
                if worker.is_lost:
                    continue
            self._idle.add(number)
            # what was given back may be for one that had nothing to do
            for other in sorted(self._idle):
                self._begin(now, other)
        assert not self._left, "a case fits no card"
        return SimulatedRun(
            ended, tuple(self._busy_s), tuple(map(tuple, self._ran)), self._loads, tuple(self._crashed),
            tuple(self._repeated),
        )  # fmt: skip

    def _at(self, now: float, number: int) -> None:
        self._drawn += 1
        heapq.heappush(self._events, (now, self._drawn, number))

    def _begin(self, now: float, number: int) -> None:
        worker = self._workers[number]
        worker.is_lost = False
        case = self._take(worker)
        if case is None:
            return
        self._idle.discard(number)
        session, took = self._times.sessions[case], self._times.seconds[worker.card][case]
        assert took is not None
        if session != worker.loaded:
            took += self._times.load_s[worker.card][session]
            self._loads += 1
        worker.case, worker.loaded, worker.since = case, session, now
        if self._losses is not None:
            lost_after = self._dice.expovariate(1 / self._losses.mean_s)
            if lost_after < took:
                worker.is_lost, took = True, lost_after
        self._at(now + took, number)

    def _cards_of(self, case: int) -> tuple[bool, ...]:
        return tuple(seconds[case] is not None for seconds in self._times.seconds)

    def _take(self, worker: _Worker) -> int | None:
        """The case that `kvsuite.distribution.affinity.choose` gives to the worker, of those that fit its card."""
        able = sorted(
            (waiting[0], session, len(waiting), waiting)
            for (session, cards), waiting in self._waiting.items()
            if waiting and cards[worker.card]
        )
        if not able:
            return None
        left: dict[int, int] = {}
        for _, session, count, _ in able:
            left[session] = left.get(session, 0) + count
        others = (other.loaded for other in self._workers if other is not worker)
        wanted = wanted_session(left, worker.loaded, others)
        first = next(waiting for _, session, _, waiting in able if session == wanted)
        self._left -= 1
        return first.popleft()[1]

    def _give_back(self, case: int) -> None:
        """The case is the next of all."""
        self._left += 1
        self._front -= 1
        self._waiting[self._times.sessions[case], self._cards_of(case)].appendleft((self._front, case))

    def _ends(self, now: float, number: int, worker: _Worker) -> bool:
        """The worker's case ends, or the worker does; whether there is a row."""
        case, worker.case = worker.case, None
        assert case is not None
        if not worker.is_lost:
            self._busy_s[number] += now - worker.since
            self._ran[number].append(case)
            return True
        assert self._losses is not None
        worker.loaded = None
        is_host = self._dice.random() < self._losses.hosts
        self._at(now + self._start_s + self._losses.away_s * is_host, number)
        if is_host and case not in self._repeated:
            self._repeated.append(case)
            self._give_back(case)
            for other in sorted(self._idle):
                self._begin(now, other)
            return False
        self._crashed.append(case)
        return True
