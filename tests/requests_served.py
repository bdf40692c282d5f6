"""One request to a session: its tokens, its times, its memory."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.engines.engine import Session
from kvsuite.engines.results import MemoryPass, ServeRequest
from kvsuite.meters.clock import Clock
from kvsuite.meters.timing import RequestTimes


def tokens_of(session: Session, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy output, untimed."""
    served = session.serve([ServeRequest(prompt, new_tokens)])
    assert served.times == []
    [output] = served.outputs
    return output


def timed(session: Session, prompt: Sequence[int], new_tokens: int, clock: Clock) -> tuple[RequestTimes, list[int]]:
    """Times and output of a timed run."""
    served = session.serve([ServeRequest(prompt, new_tokens)], clock)
    [times], [output] = served.times, served.outputs
    return times, output


def times_of(session: Session, prompt: Sequence[int], new_tokens: int, clock: Clock) -> RequestTimes:
    """Times of a timed run."""
    return timed(session, prompt, new_tokens, clock)[0]


def memory_of(session: Session, prompt: Sequence[int], new_tokens: int) -> MemoryPass:
    """The memory pass."""
    return session.memory([ServeRequest(prompt, new_tokens)])
