"""Who measures what, and what becomes of a case whose worker or host is lost: every case ends as one row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsuite.distribution.affinity import choose
from kvsuite.distribution.order import session_key
from kvsuite.errors import UserError
from kvsuite.options.resolve import Options
from kvsuite.suites.footprint import Footprint
from kvsuite.survival.death import Cause, crashed_row
from kvsuite.survival.settings import machine_differences, software_differences

from .hands import Hands, Lost
from .orders import Answer, Node, Order, Ready

#: seconds between two looks for hosts that have come
_LOOK_S = 5.0
_POLL_S = 0.5
#: a worker that has not begun by then waits for what another job holds, or hangs
_BEGIN_S = 300.0
#: how long a host that was lost gets no work, should the cluster still list it
_SUSPECT_S = 60.0
#: workers that a host may fail to start, one after another
_MOST_STARTS = 3
_CRASHED_BY = "worker lost"


@dataclass
class _Hand:
    """A worker as the dispatcher knows it."""

    node: Node
    since: float
    ready: Ready | None = None
    order: Order | None = None
    last: tuple[str | None, ...] | None = None


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
        How many workers there were on that node.
    gpu
        Entry of ``CUDA_VISIBLE_DEVICES`` that the worker was given.
    """

    order: Order
    answer: Answer
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
    """

    hands: Hands
    orders: Sequence[Order]
    options: Options
    code: Mapping[str, str]
    footprints: Mapping[str, Footprint]
    tell: Callable[[str], None]
    now: Callable[[], float] = time.monotonic
    _workers: dict[int, _Hand] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _suspect: dict[str, float] = field(default_factory=dict)
    _starts: Counter[str] = field(default_factory=Counter)
    _first: tuple[Node, Mapping[str, Any]] | None = None
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
            elif isinstance(said, Lost):
                del self._workers[number]
                finished = self._lost(hand, said)
                if finished is not None:
                    yield finished
                self._look()
            else:
                order, hand.order = hand.order, None
                assert order is not None
                assert hand.ready is not None
                yield Finished(order, said, hand.node, self._company(hand), hand.ready.gpu)
            self._hand_out()

    # hosts

    def _look(self) -> None:
        """Start workers on hosts that have room for more, and give up those that do not begin."""
        now = self.now()
        for number, hand in list(self._workers.items()):
            if hand.ready is None and now - hand.since > _BEGIN_S:
                self.hands.stop(number)
                del self._workers[number]
                self._refuse(
                    hand.node,
                    f"its worker has not begun within {_BEGIN_S:g} s: another job may hold its GPUs or cores",
                )
        nodes = self.hands.nodes()
        for node in nodes:
            if node.id in self._refused or self._suspect.get(node.id, now) > now:
                continue
            there = sum(hand.node.id == node.id for hand in self._workers.values())
            for _ in range(node.slots - there):
                self._workers[self.hands.start(node)] = _Hand(node, now)
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
        if reason is None and self._first is not None:
            first, environment = self._first
            different = software_differences(environment, ready.environment)
            reason = f"other software than {first}: {'; '.join(different)}" if different else None
        if reason is not None:
            self.hands.stop(number)
            del self._workers[number]
            self._refuse(node, reason)
            return
        self._starts[node.id] = 0
        hand.ready = ready
        if self._first is None:
            self._first = node, ready.environment
        elif node.id not in self._marked:
            self._marked.add(node.id)
            first, environment = self._first
            if different := machine_differences(environment, ready.environment):
                self.tell(f"kvsuite: node {node} is another machine than {first}: {'; '.join(different)}")

    def _refuse(self, node: Node, reason: str) -> None:
        if node.id not in self._refused:
            self._refused[node.id] = f"node {node}: {reason}"
            self.tell(f"kvsuite: node {node} is left out: {reason}")

    def _company(self, hand: _Hand) -> int:
        return sum(other.node.id == hand.node.id and other.ready is not None for other in self._workers.values())

    # orders

    def _hand_out(self) -> None:
        for number, hand in self._workers.items():
            if hand.ready is None or hand.order is not None:
                continue
            able = [order for order in self._waiting if self._may(order, hand)]
            if not able:
                continue
            others = [other.last for other in self._workers.values() if other is not hand]
            order = choose(able, lambda one: session_key(one.case), hand.last, others)
            self._waiting.remove(order)
            hand.order, hand.last, hand.since = order, session_key(order.case), self.now()
            self.hands.give(number, order)

    def _may(self, order: Order, hand: _Hand) -> bool:
        """Whether the worker has room for the case, or nobody has: then its row says so."""
        return self._fits(order, hand) or not any(
            self._fits(order, other) for other in self._workers.values() if other.ready is not None
        )

    def _fits(self, order: Order, hand: _Hand) -> bool:
        need = self.footprints.get(order.id)
        room = None if hand.ready is None else hand.ready.memory_bytes
        return need is None or room is None or need.fits(room) != "no"

    def _lost(self, hand: _Hand, lost: Lost) -> Finished | None:
        """A worker is gone: its case is given back, once, if its host went too, and has crashed else."""
        node, order = hand.node, hand.order
        if lost.node_is_gone:
            if node.id not in self._suspect:
                self.tell(f"kvsuite: node {node} is gone: {lost.reason}")
            self._suspect[node.id] = self.now() + _SUSPECT_S
        elif hand.ready is None:
            self._starts[node.id] += 1
            if self._starts[node.id] >= _MOST_STARTS:
                self._refuse(node, f"no worker starts there: {lost.reason}")
        if order is None:
            return None
        if lost.node_is_gone:
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
        answer = Answer(crashed_row(entry, cause), None, environment)
        return Finished(order, answer, node, self._company(hand) + 1, hand.ready.gpu)
