"""What goes into a session and what comes out: requests, what was served, memory, scores, and what reaches the runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvsuite.meters.memory import Phase, Reading
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.serving_times import LoadTimes
from kvsuite.meters.timing import RequestTimes
from kvsuite.models.images import ImagePixels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvsuite.meters.served_divergence import LogProbabilityRows

#: which lane launched a step: ``both`` where one stream does everything
Lane = Literal["decode", "prompt", "both"]
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
    arrival_s
        When it comes, in seconds after the start: 0 is at once. Only sessions that serve under load wait for it
        (`kvsuite.engines.capabilities.ServesUnderLoad`); others refuse it.
    forced
        ``new_tokens`` tokens that are fed in the place of the chosen ones. Their losses come back.
    rows
        Whose log-probabilities come back for every output token, beside losses: those of so many of the most probable
        tokens, or of the tokens ``[new_tokens, k]`` of a vocabulary.
    images
        Their features stand where the prompt has the model's image tokens, in order. Sessions that read none refuse them
        (`kvsuite.engines.capabilities.ReadsImages`).

    Raises
    ------
    ValueError
        If the arrival is no time, or not exactly ``new_tokens`` tokens are forced.
    """

    prompt: Sequence[int]
    new_tokens: int
    arrival_s: float = 0.0
    forced: Sequence[int] | None = None
    rows: int | NDArray[Any] | None = field(default=None, compare=False)
    images: Sequence[ImagePixels] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(f"arrival_s={self.arrival_s}: must be seconds after the start")
        if self.forced is not None and len(self.forced) != self.new_tokens:
            raise ValueError(f"forced: {len(self.forced)} tokens where new_tokens={self.new_tokens} are generated")

    @property
    def scored(self) -> bool:
        """Whether losses of its output are wanted."""
        return self.forced is not None or self.rows is not None


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
class OutputScores:
    """What the model said of a request's output tokens, forced or chosen, position by position.

    Parameters
    ----------
    nll
        ``-log p`` of each, in nats, from a float32 log-softmax.
    top1
        The most probable token there.
    rows
        Log-probabilities of the tokens that `ServeRequest.rows` names; ``None`` where it names none.
    """

    nll: list[float]
    top1: list[int]
    rows: LogProbabilityRows | None = None


@dataclass(frozen=True)
class RequestServed(LoadTimes):
    """One request that was served under load, with its times.

    Parameters
    ----------
    prompt_tokens
        Tokens of the prompt, whatever was computed for them.
    cached_tokens
        Those of them whose keys were found in the prefix cache at the first admission. This and what follows is ``None``
        where the engine does not tell it.
    computed_prompt_tokens
        Tokens that went through the model for it beside one for each further output token: its prompt without what was
        found in the cache, and what a preemption made it compute again.
    preemptions
        How often its blocks were taken from it.
    stored_tokens
        Tokens whose keys its blocks held at its end, mean over the attention layers.
    evicted_tokens
        Tokens that had been removed by then, mean over the attention layers: by a policy, or a window.
    scores
        Of its output, where they were asked for.
    compress_s
        Seconds that compressing its prompt took where that was done: on CUDA between events of the stream that did it, else
        by the host's clock. ``None`` where nothing was removed.
    """

    prompt_tokens: int
    cached_tokens: int | None
    computed_prompt_tokens: int | None
    preemptions: int | None
    stored_tokens: float | None
    evicted_tokens: float | None
    scores: OutputScores | None = None
    compress_s: float | None = None


@dataclass(frozen=True)
class StepServed:
    """One step as the host saw it. Where steps overlap, tokens that are delivered in it are those of the step before.

    Parameters
    ----------
    lane
        Which lane launched it: ``both`` where one stream does everything.
    start_s, end_s
        Host clock, seconds after the start of the run.
    prompt_tokens, decode_tokens
        Tokens that it fed: of prompts (and what a resumed request computes again), and one each of decoding requests.
    running, waiting
        Requests that held blocks in it, those that are over at its end too, and those that wait for them at its end.
    used_blocks
        Blocks in use at its beginning or at its end, whichever are more, of the fullest layer group.
    """

    lane: Lane
    start_s: float
    end_s: float
    prompt_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    used_blocks: int


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
    requests, steps
        Of requests that were served under load: each of them, in their order, and every step where the engine tells of steps.
    decisions
        What a controller decided, with its inputs and times, in JSON types.
    waited_s
        Seconds that the host waited for the device's tokens.
    """

    times: list[RequestTimes]
    outputs: list[list[int]]
    counts: dict[str, int] = field(default_factory=dict)
    texts: list[str] | None = None
    engine: EngineView | None = None
    requests: list[RequestServed] = field(default_factory=list)
    steps: list[StepServed] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    waited_s: float = 0.0


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
class WholeScores:
    """Scores of a text that one forward pass took through a cache.

    Parameters
    ----------
    tokens
        Scores of all tokens but the first.
    kv_bytes
        Live storages of the cache's keys and values, all tokens of the text stored.
    """

    tokens: TokenScores
    kv_bytes: int


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
