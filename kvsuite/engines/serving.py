"""What an engine does that serves several requests at once: the design-space suite's side of a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.prediction import Part, Predictor
from kvsuite.meters.clock import Clock
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.workloads.windows import Window

from .engine import MemoryPass

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
        Of each request, from one origin.
    outputs
        Token ids of each; empty for an engine that gives text.
    counts
        What the runtime counted: steps, tokens computed, preemptions, …
    texts
        What an engine that gives text gave for each.
    engine
        What a server says itself.
    """

    times: list[RequestTimes]
    outputs: list[list[int]]
    counts: dict[str, int]
    texts: list[str] | None = None
    engine: EngineView | None = None


class Serving(ABC):
    """A prepared design point: a runtime with its limits, for requests that come all at once."""

    #: why it scores no text; ``None`` if it does
    cannot_score: ClassVar[str | None] = None
    #: what the parts of predicted memory are called in a record
    memory_parts: ClassVar[Mapping[Part, str]] = {
        "parameters": "weights_bytes",
        "kv_cache": "pool_bytes",
        "temporary": "workspace_bytes",
    }

    def clock(self, usual: Clock) -> Clock:
        """The clock of its times: ``usual``, that of the device, unless only a client can tell."""
        return usual

    def floor_unknown(self) -> str | None:
        """Why the floor of a decode step is not known, ``None`` if it is."""
        return None

    def engine_metrics(self, served: Sequence[Served]) -> dict[str, float]:
        """What the engine itself counted in these rounds, by its own names; ``{}`` where it counts nothing."""
        return {}

    @abstractmethod
    def predictor(self, architecture: Architecture) -> Predictor:
        """Predicts the memory of this point from the model's configuration alone."""

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
