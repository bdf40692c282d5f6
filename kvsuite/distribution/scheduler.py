"""xdist's scheduler for cases: those of one model stay on one worker while that costs no time; a death costs one case."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from xdist.scheduler import LoadScheduling

from .affinity import choose

# a worker of xdist begins a test only when it knows the next one, or that there is none
_QUEUE = 2


class Desk(Protocol):
    """What the scheduler asks about tests by their node ids."""

    def session_of(self, node_id: str) -> Hashable | None:
        """What the case shares with others (a loaded model), ``None`` for a test that is no case."""

    def has_begun(self, node: Any, node_id: str) -> bool:
        """Whether the case is running on that worker, or was when it died."""

    def has_row(self, node_id: str) -> bool:
        """Whether the case's record was written."""


class CaseScheduling(LoadScheduling):  # type: ignore[misc]
    """As ``--dist=load`` where no cases are collected; else hands out one case at a time.

    Parameters
    ----------
    config, log
        xdist's.
    desk
        Knows the cases.
    """

    def __init__(self, config: Any, log: Any, desk: Desk) -> None:
        super().__init__(config, log)
        self.collection: Any
        self.pending: list[int]
        self._desk = desk
        self._sessions: list[Hashable | None] = []
        self._last: dict[Any, Hashable | None] = {}

    def schedule(self) -> None:
        """Begin, or take in a worker that came later."""
        if self.collection is None:
            collected = next(iter(self.node2collection.values()))
            self._sessions = [self._desk.session_of(node_id) for node_id in collected]
            if any(session is not None for session in self._sessions) and self._check_nodes_have_same_collection():
                self.collection = collected
                self.pending[:] = range(len(collected))
                for node in self.nodes:
                    self._hand_out(node, 1)
        super().schedule()

    def check_schedule(self, node: Any, duration: float = 0) -> None:
        """Fill a worker's queue, or let it go home."""
        if not self._has_cases:
            super().check_schedule(node, duration)
        elif not node.shutting_down:
            self._hand_out(node, _QUEUE)
            if not self.pending:
                node.shutdown()

    def remove_node(self, node: Any) -> str | None:
        """A worker is gone: what it had not begun goes to others, and what it was running, if anything, is returned."""
        if not self._has_cases:
            gone: str | None = super().remove_node(node)
            return gone
        queue = self.node2pending.pop(node)
        self._last.pop(node, None)
        crashed = None
        if queue:
            first = self.collection[queue[0]]
            is_case = self._sessions[queue[0]] is not None
            if is_case and self._desk.has_row(first):
                queue.pop(0)
            elif not is_case or self._desk.has_begun(node, first):
                queue.pop(0)
                crashed = first
        self.pending[:0] = queue
        for other in self.node2pending:
            self.check_schedule(other)
        return crashed

    @property
    def _has_cases(self) -> bool:
        return self.collection is not None and any(session is not None for session in self._sessions)

    def _hand_out(self, node: Any, queue: int) -> None:
        while self.pending and len(self.node2pending[node]) < queue:
            index = self._choose(node)
            self.pending.remove(index)
            self._last[node] = self._sessions[index]
            self.node2pending[node].append(index)
            node.send_runtest_some([index])

    def _choose(self, node: Any) -> int:
        others = (session for other, session in self._last.items() if other is not node)
        return choose(self.pending, self._sessions.__getitem__, self._last.get(node), others)
