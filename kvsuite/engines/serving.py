"""What an engine does that serves several requests at once: the design-space suite's side of a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.meters.clock import Clock
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.workloads.windows import Window

from .base import MemoryPass

#: tokens scored and in all, and the mean loss so far in nats
StreamProgress = Callable[[int, int, float], None]


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
class Served:
    """Requests that were served together.

    Parameters
    ----------
    times
        Of each request, from one origin.
    outputs
        Token ids of each.
    counts
        What the runtime counted: steps, tokens computed, preemptions, …
    """

    times: list[RequestTimes]
    outputs: list[list[int]]
    counts: dict[str, int]


class Serving(ABC):
    """A prepared design point: a runtime with its limits, for requests that come all at once."""

    @abstractmethod
    def reach(self, params: dict[str, Any], workload: dict[str, Any]) -> Reach:
        """What of a point, this one or another of the same model, reaches the runtime."""

    @abstractmethod
    def serve(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Clock) -> Served:
        """Serve all prompts at once, exactly ``new_tokens`` for each, greedily.

        With prefix caching on, prompts that were served just before are found again.
        """

    @abstractmethod
    def memory_pass(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> MemoryPass:
        """Run the shape of `serve` once with the memory meters on; bytes are those of all requests together."""

    @abstractmethod
    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int) -> int:
        """Predicted cache bytes of so many requests at the end of decode."""

    @abstractmethod
    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int) -> float:
        """Cache bytes that a decode step of so many requests reads: those its queries can see, mean over the steps."""

    @abstractmethod
    def score(self, tokens: Sequence[int], windows: Sequence[Window], progress: StreamProgress | None) -> TokenScores:
        """Teacher-forced losses of the targets of ``windows`` through the limits of the point.

        Each window is a stream of its own, no longer than the context; a token sees of it what the sliding window and the
        sinks leave.
        """
