"""What goes into a session and what comes out: requests, what was served, memory, scores, and what reaches the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsuite.meters.memory import Phase, Reading
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes

#: called with targets done, targets in all, and the mean loss so far in nats
WindowProgress = Callable[[int, int, float], None]
#: called with the index of a scored row and its logits ``[1, vocab]``, a tensor
TakeRow = Callable[[int, Any], None]
#: called with tokens done and in all
TokenProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ServeRequest:
    """One request to a session: a prompt, and how many tokens are wanted.

    Parameters
    ----------
    prompt
        Token ids.
    new_tokens
        Exactly so many are generated, greedily; an end of text ends nothing.
    """

    prompt: Sequence[int]
    new_tokens: int


@dataclass(frozen=True)
class EngineView:
    """What a server says itself of requests that it served.

    Parameters
    ----------
    times
        By the names of our metrics (``engine_…``), by its clock: shown beside our times, never among them.
    before, after
        Its counters at the begin and at the end.
    """

    times: Mapping[str, float]
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class Served:
    """Requests that were served together.

    Parameters
    ----------
    times
        Of each request, from one origin; empty where no clock was given.
    outputs
        Token ids of each; empty for an engine that gives text.
    counts
        What the runtime counted: steps, tokens computed, preemptions, …; empty for an engine that counts nothing.
    texts
        What an engine that gives text gave for each.
    engine
        What a server says itself.
    """

    times: list[RequestTimes]
    outputs: list[list[int]]
    counts: dict[str, int] = field(default_factory=dict)
    texts: list[str] | None = None
    engine: EngineView | None = None


@dataclass
class MemoryPass:
    """What the instrumented pass of a case found; it is never timed.

    An engine that does not tell what its cache holds leaves ``kv_bytes_*`` out and says why in ``unseen``.
    """

    prefill: Phase
    decode: Phase
    resident: Reading
    driver: Reading
    kv_bytes_prefill: int | None
    kv_bytes_decode: int | None
    kv_bytes_allocated: int | None
    lengths_prefill: list[int]
    lengths_decode: list[int]
    compress_s: float | None = None
    evict_s: float | None = None
    unseen: str | None = None
    effective: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: further terms in bytes, predicted from formulas and reported by the engine, for an engine that has them
    predicted: dict[str, int] = field(default_factory=dict)
    reported: dict[str, int] = field(default_factory=dict)

    @classmethod
    def unmeasured(cls, reason: str, *, unseen: str | None = None, **known: Any) -> MemoryPass:
        """The pass of an engine that counts no allocations, for ``reason``.

        Parameters
        ----------
        reason
            Stands where a number is missing.
        unseen
            Why the bytes of the cache are not known, ``reason`` if left out.
        known
            Fields that are known all the same.
        """
        fields: dict[str, Any] = {
            "prefill": Phase(*(Reading(reason=reason) for _ in range(3))),
            "decode": Phase(*(Reading(reason=reason) for _ in range(3))),
            "resident": Reading(reason=reason),
            "driver": Reading(reason=reason),
            "kv_bytes_prefill": None,
            "kv_bytes_decode": None,
            "kv_bytes_allocated": None,
            "lengths_prefill": [],
            "lengths_decode": [],
            "unseen": unseen or reason,
        }
        return cls(**(fields | known))


@dataclass(frozen=True)
class Reach:
    """What of a design point reaches the runtime.

    Parameters
    ----------
    settings
        What the runtime is really set to, in JSON types: two points with equal settings are one measurement.
    inert
        Axes of the point, by their names in ``params``, that change nothing here, each with the reason.
    """

    settings: dict[str, Any]
    inert: dict[str, str]


@dataclass(frozen=True)
class WindowScores:
    """Scores of a text in windows, and what it took.

    Parameters
    ----------
    tokens
        The scores, in the order of the text.
    forward_tokens
        Tokens that went through the model.
    forwards
        Forward passes.
    effective
        What was really done: ``head`` (``split``: only scored rows were projected, or ``whole``), ``batch_windows`` (most
        windows in one forward), ``batch_tokens`` (the budget), ``logit_rows`` (rows projected at a time).
    """

    tokens: TokenScores
    forward_tokens: int
    forwards: int
    effective: dict[str, Any] = field(default_factory=dict)
