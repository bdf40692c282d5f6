"""Which waiting case a worker takes next: cases of one loaded model stay on one worker while that costs no time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")
Session = TypeVar("Session", bound=Hashable | None)


def choose(
    waiting: Sequence[Thing],
    session_of: Callable[[Thing], Hashable | None],
    loaded: Hashable | None,
    others: Iterable[Hashable | None],
) -> Thing:
    """The next of the session that the worker has loaded; else of the one with most left for each worker on it.

    Parameters
    ----------
    waiting
        What is to be done, in its order; not empty.
    session_of
        What a thing shares with others (`kvsuite.distribution.order.session_key`).
    loaded
        What this worker did last.
    others
        What every other worker did last, or does.
    """
    wanted = wanted_session(Counter(map(session_of, waiting)), loaded, others)
    return next(thing for thing in waiting if session_of(thing) == wanted)


def wanted_session(left: Mapping[Session, int], loaded: Hashable | None, others: Iterable[Hashable | None]) -> Session:
    """The rule of `choose`, for those that count themselves.

    Parameters
    ----------
    left
        How many things of each session wait, none of them 0, in the order of their first ones.
    loaded, others
        As for `choose`.
    """
    for session in left:
        if session == loaded:
            return session
    busy = Counter(others)
    return max(left, key=lambda session: left[session] / (1 + busy[session]))
