"""What the dispatcher needs of a cluster. Ray is one (`kvsuite.cluster.ray_cluster`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .orders import CaseAnswer, Node, Order, Ready


@dataclass(frozen=True)
class Lost:
    """A worker is gone, and with it what it was doing.

    Parameters
    ----------
    node_is_gone
        Whether its host is too.
    reason
        In words.
    is_unbegun
        Whether it was gone before it began the order that it was given last.
    is_out_of_reach
        Whether it may be alive on a host that is still there, and nobody will hear of what it measures.
    """

    node_is_gone: bool
    reason: str
    is_unbegun: bool = False
    is_out_of_reach: bool = False


class Hands(Protocol):
    """Workers on hosts. A worker is a number."""

    def nodes(self) -> Sequence[Node]:
        """The hosts that are there now, each with room for at least one worker."""

    def start(self, node: Node) -> int:
        """Start a worker on a host; its first news is a `Ready`."""

    def give(self, worker: int, order: Order) -> None:
        """Let a worker measure; its next news is a `CaseAnswer`."""

    def news(self, timeout_s: float) -> tuple[int, Ready | CaseAnswer | Lost] | None:
        """What a worker has to say, ``None`` if none has in so many seconds. A worker that is lost is never heard of again."""

    def stop(self, worker: int) -> None:
        """End a worker."""
