"""Who measures what, and what becomes of a case whose worker or host is lost: every case ends as one row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvsuite.distribution.affinity import choose
from kvsuite.distribution.order import session_key
from kvsuite.errors import UserError
from kvsuite.options.resolve import Options
from kvsuite.suites.footprint import Footprint
from kvsuite.survival.death import Cause, crashed_row
from kvsuite.survival.settings import machine_differences

from .hands import Hands, Lost
from .orders import BEGIN_S, CaseAnswer, Node, Order, Ready
from .reference import Reference

#: seconds between two looks for hosts that have come
_LOOK_S = 5.0
_POLL_S = 0.5
#: how long a host that was lost gets no work, should the cluster still list it
_SUSPECT_S = 60.0
#: workers that a host may fail to start, one after another
_MOST_STARTS = 3
#: how often a case is given again because its worker was dead before it began
_MOST_UNBEGUN = 3
#: rank of a worker that can measure a case
_ABLE = 2
_CRASHED_BY = "worker lost"


@dataclass
class _Hand:
    """A worker as the dispatcher knows it."""

    node: Node
    since: float
    ready: Ready | None = None
    order: Order | None = None
    last: tuple[str | None, ...] | None = None
    #: the most workers that measured or started on its host since it was given its order
    company: int = 1


@dataclass(frozen=True)
class Finished:
    """A case has its row.

    Parameters
    ----------
    order
        What was asked for.
    answer
        What became of it.
    node
        Where.
    workers
        The most that measured or started on that node while this one measured.
    gpu
        Entry of ``CUDA_VISIBLE_DEVICES`` that the worker was given.
    """

    order: Order
    answer: CaseAnswer
    node: Node
    workers: int
    gpu: str | None


@dataclass
class Dispatch:
    """Hands out orders until all have a row.

    Parameters
    ----------
    hands
        The cluster.
    orders
        What is to be measured, in its order.
    options
        Of the run.
    code
        Hashes of the controller's code that measures: a node with another one is refused.
    footprints
        What memory cases need, by their ids, as far as it is known.
    tell
        Takes a line for the user.
    now
        Clock in seconds.
    reference
        Whose software nodes must have; that of the first node that answers, if left out, and beside it in any case.
    """

    hands: Hands
    orders: Sequence[Order]
    options: Options
    code: Mapping[str, str]
    footprints: Mapping[str, Footprint]
    tell: Callable[[str], None]
    now: Callable[[], float] = time.monotonic
    reference: Reference | None = None
    _workers: dict[int, _Hand] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _suspect: dict[str, float] = field(default_factory=dict)
    _starts: Counter[str] = field(default_factory=Counter)
    #: workers of a host that were given up, while others of it measure
    _fewer: Counter[str] = field(default_factory=Counter)
    _unbegun: Counter[str] = field(default_factory=Counter)
    #: hosts that have answered an order with what ends a run
    _complained: set[str] = field(default_factory=set)
    _first: Reference | None = None
    _marked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._waiting = list(self.orders)

    @property
    def running(self) -> Counter[str]:
        """Cases that are being measured, by node."""
        return Counter(str(hand.node) for hand in self._workers.values() if hand.order is not None)

    @property
    def workers(self) -> int:
        """How many can measure now."""
        return sum(hand.ready is not None for hand in self._workers.values())

    @property
    def left(self) -> int:
        """Cases without a row."""
        return len(self._waiting) + sum(hand.order is not None for hand in self._workers.values())

    @property
    def starting(self) -> int:
        """Workers that have not begun."""
        return len(self._workers) - self.workers

    def rows(self, beat: Callable[[], None]) -> Iterator[Finished]:
        """Yield every case once, as it ends; the worker that measured it is idle until the next one is asked for.

        Parameters
        ----------
        beat
            Is called about every half second, and may raise.

        Raises
        ------
        UserError
            If no node is left.
        """
        looked = -_LOOK_S
        while self.left:
            self._hand_out()
            beat()
            if self.now() - looked >= _LOOK_S:
                looked = self.now()
                self._look()
            news = self.hands.news(_POLL_S)
            if news is None:
                continue
            number, said = news
            hand = self._workers[number]
            if isinstance(said, Ready):
                self._take_in(number, hand, said)
                continue
            if isinstance(said, Lost):
                del self._workers[number]
                finished = self._lost(hand, said)
            else:
                finished = self._answered(number, hand, said)
            if finished is not None:
                yield finished
            # the last case needs nobody any more
            if isinstance(said, Lost) and self.left:
                self._look()

    # hosts

    def _look(self) -> None:
        """Start workers on hosts that have room for more, and give up those that do not begin."""
        now = self.now()
        for number, hand in list(self._workers.items()):
            if hand.ready is None and now - hand.since > BEGIN_S:
                self._end(number)
                self._give_up(
                    hand.node, f"it has not begun within {BEGIN_S:g} s: another job may hold its GPU or cores"
                )
        nodes = self.hands.nodes()
        for node in nodes:
            if node.id in self._refused or self._suspect.get(node.id, now) > now:
                continue
            there = sum(hand.node.id == node.id for hand in self._workers.values())
            for _ in range(node.slots - self._fewer[node.id] - there):
                self._workers[self.hands.start(node)] = _Hand(node, now)
        self._note_company()
        if not self._workers and not any(self._suspect.get(node.id, now) > now for node in nodes):
            raise UserError(self._nobody(nodes))

    def _nobody(self, nodes: Sequence[Node]) -> str:
        if self._first is not None:
            return "--kv-cluster: no node is left; add nodes and go on with --kv-resume=latest"
        if self._refused:
            return f"--kv-cluster: no node can measure: {'; '.join(self._refused.values())}"
        if nodes:
            return "--kv-cluster: no worker could be started"
        return (
            "--kv-cluster: no node has a GPU or as many cores as a worker is to have; add nodes, or give another --kv-device "
            "or --kv-cluster-cores"
        )

    def _take_in(self, number: int, hand: _Hand, ready: Ready) -> None:
        """A worker has looked around: its host is used, marked or refused."""
        node, reason = hand.node, ready.refusal
        if reason is None:
            other = sorted(name for name in self.code.keys() & ready.code.keys() if self.code[name] != ready.code[name])
            other += sorted(self.code.keys() ^ ready.code.keys())
            reason = f"its code of {', '.join(other)} is not the controller's" if other else None
        for reference in (self.reference, self._first):
            if reason is None and reference is not None and (different := reference.differences(ready.environment)):
                reason = f"other software than {reference.name}: {'; '.join(different)}"
        if reason is not None:
            self._end(number)
            self._refuse(node, reason)
            return
        self._starts[node.id] = 0
        hand.ready = ready
        if self._first is None:
            self._first = Reference(str(node), ready.environment)
            self._marked.add(node.id)
        if node.id not in self._marked:
            self._marked.add(node.id)
            if different := machine_differences(self._first.environment, ready.environment):
                self.tell(f"kvsuite: node {node} is another machine than {self._first.name}: {'; '.join(different)}")
        # two nodes may have an engine that the first one lacks
        self._first = self._first.with_engines(ready.environment)

    def _refuse(self, node: Node, reason: str) -> None:
        if node.id not in self._refused:
            self._refused[node.id] = f"node {node}: {reason}"
            self.tell(f"kvsuite: node {node} is left out: {reason}")

    def _give_up(self, node: Node, reason: str) -> None:
        """Have one worker less on a host, or leave the host out if it has no other that can measure."""
        if any(hand.node.id == node.id and hand.ready is not None for hand in self._workers.values()):
            self._fewer[node.id] += 1
            self.tell(f"kvsuite: node {node} has one worker less: {reason}")
        else:
            self._refuse(node, f"no worker starts there: {reason}")

    def _end(self, number: int) -> None:
        self.hands.stop(number)
        del self._workers[number]

    def _note_company(self) -> None:
        # who starts loads torch and a model, and is as much beside a case as who measures
        there = Counter(hand.node.id for hand in self._workers.values() if hand.order is not None or hand.ready is None)
        for hand in self._workers.values():
            hand.company = max(hand.company, there[hand.node.id])

    # orders

    def _hand_out(self) -> None:
        for number, hand in list(self._workers.items()):
            if hand.ready is None or hand.order is not None:
                continue
            if hand.node.id in self._refused:
                self._end(number)
                continue
            able = [order for order in self._waiting if self._may(order, hand)]
            if not able:
                continue
            others = [other.last for other in self._workers.values() if other is not hand]
            order = choose(able, lambda one: session_key(one.case), hand.last, others)
            self._waiting.remove(order)
            hand.order, hand.last, hand.since, hand.company = order, session_key(order.case), self.now(), 1
            self.hands.give(number, order)
        self._note_company()

    def _may(self, order: Order, hand: _Hand) -> bool:
        """Whether the worker can measure the case, or nobody can better and nobody is to come: then its row says so."""
        rank = self._rank(order, hand)
        if rank == _ABLE:
            return True
        now = self.now()
        if self.starting or any(until > now for until in self._suspect.values()):
            return False
        return rank == max(self._rank(order, other) for other in self._workers.values())

    def _rank(self, order: Order, hand: _Hand) -> int:
        """How far the worker can measure the case: it has no such engine (0), too little memory (1), all (2)."""
        ready = hand.ready
        if ready is None or (order.case.engine, order.case.device) in ready.unusable:
            return 0
        need, room = self.footprints.get(order.id), ready.memory_bytes
        return _ABLE if need is None or room is None or need.fits(room) != "no" else _ABLE - 1

    def _answered(self, number: int, hand: _Hand, answer: CaseAnswer) -> Finished | None:
        """A worker has answered. What would end the run ends it once a second host says such a thing, or no other is there."""
        order, hand.order = hand.order, None
        assert order is not None
        assert hand.ready is not None
        node = hand.node
        if answer.usage_error is not None:
            others = any(other.node.id != node.id for other in self._workers.values())
            if others and not self._complained - {node.id}:
                self._complained.add(node.id)
                self._waiting.insert(0, order)
                self._end(number)
                self._refuse(node, answer.usage_error)
                return None
        return Finished(order, answer, node, hand.company, hand.ready.gpu)

    def _lost(self, hand: _Hand, lost: Lost) -> Finished | None:
        """A worker is gone: its case is given back, once, if its host went too or is out of reach, and has crashed else."""
        node, order = hand.node, hand.order
        if lost.node_is_gone:
            if node.id not in self._suspect:
                self.tell(f"kvsuite: node {node} is gone: {lost.reason}")
            self._suspect[node.id] = self.now() + _SUSPECT_S
        elif hand.ready is None:
            self._starts[node.id] += 1
            if self._starts[node.id] >= _MOST_STARTS:
                self._give_up(node, lost.reason)
        if order is None:
            return None
        if lost.is_unbegun:
            # a worker that was dead already says nothing of the case
            self._unbegun[order.id] += 1
            if self._unbegun[order.id] <= _MOST_UNBEGUN:
                self._waiting.insert(0, order)
                return None
        if lost.node_is_gone or lost.is_out_of_reach:
            order.lost_on.append(str(node))
            if len(order.lost_on) == 1:
                self._waiting.insert(0, order)
                return None
            cause = Cause("node lost", f"the nodes that measured it were lost: {', then '.join(order.lost_on)}")
        else:
            cause = Cause(_CRASHED_BY, f"the worker that watched it on node {node} is gone: {lost.reason}")
        assert hand.ready is not None
        environment = hand.ready.environment
        row = order.record(self.options, environment)
        entry = {"row": row, "phase": "unknown", "began": hand.since}
        answer = CaseAnswer(crashed_row(entry, cause), None, environment)
        return Finished(order, answer, node, hand.company, hand.ready.gpu)
