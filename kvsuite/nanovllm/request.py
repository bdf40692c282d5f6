"""A request: tokens in, tokens out, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvsuite.models.images import ImagePixels

from .sampling import SamplingParameters

OnToken = Callable[["Request", int, float], None]
#: when a policy acts (`kvsuite.compression.base.Policy.acts`); ``None`` where there is none
Acts = Literal["prompt", "decode"] | None


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def __init__(self, name: str) -> None:
        #: whether nothing more will happen to the request; looked up and not computed, since every token asks
        self.over = name in ("finished", "failed", "cancelled")


@dataclass(eq=False)
class Request:
    """One prompt and its output.

    Parameters
    ----------
    prompt
        Token ids.
    sampling
        How output tokens are chosen, and when it ends.
    on_token
        Called with the request, every output token, and the time (`time.perf_counter`, s) at which the host had it. If it
        raises, this request fails; no other is touched.
    forced
        Output tokens that are taken instead of the model's own: to score a text, or to compare runtimes on one.
    scored
        Last tokens of the prompt whose final hidden states are wanted (`Runtime.on_rows`) and nothing else: the request
        is over when its prompt is computed, and has no output.
    together
        First tokens that are one forward pass where the request is alone, however steps cut them; what follows comes token by
        token. The prompt if left out. Rotary frequencies that change with the length depend on it.
    images
        Their features stand where the prompt has image tokens, in order. A text has neither.
    image_spans
        Where each image stands, first token and the one behind its last; the runtime finds those of ``images``.
    id
        Chosen by the runtime if left out.
    """

    prompt: Sequence[int]
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    on_token: OnToken | None = None
    forced: Sequence[int] | None = None
    scored: int = 0
    together: int = 0
    images: Sequence[ImagePixels] = ()
    image_spans: tuple[tuple[int, int], ...] = ()
    id: str | None = None

    status: Status = field(default=Status.WAITING, init=False)
    #: why it failed, or what ended it: ``stop``, ``length``, ``scored``, ``cancelled``
    reason: str | None = field(default=None, init=False)
    #: what a callback or a step raised
    error: Exception | None = field(default=None, init=False)
    #: prompt and output
    tokens: list[int] = field(init=False)
    #: whether the last of `tokens` is on its way: a placeholder until it is delivered
    in_flight: bool = field(default=False, init=False)
    #: tokens that the model has been fed and whose keys are, or were, stored: logical, whatever a policy removed
    computed: int = field(default=0, init=False)
    #: tokens whose keys were found in the prefix cache when it was first admitted
    prefix_hits: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    #: tokens that went through the model for it, again after a preemption
    fed: int = field(default=0, init=False)
    #: `time.perf_counter` when it first got a row of the tables
    admitted_at: float | None = field(default=None, init=False)
    #: tokens whose keys its blocks held when it gave them back last, per layer group
    stored: list[int] = field(default_factory=list, init=False)
    #: `time.perf_counter` of every output token
    times: list[float] = field(default_factory=list, init=False)
    #: first tokens that are computed as a prompt: those known when it was last admitted, an earlier output included
    prefill: int = field(default=0, init=False)
    #: with two lanes, whether the decode lane has it
    handed_over: bool = field(default=False, init=False)
    #: whether the policy leaves its prompt as it is: expected when it is admitted, known when its prompt is complete
    spared: bool = field(default=False, init=False)
    #: tokens fed behind the prompt until what was merged of it layer by layer takes its place, 0 where that is at its end:
    #: expected when it is admitted, known when its prompt is complete, and the same when it is computed again
    merged_after: int = field(default=0, init=False)
    #: whether its prompt is complete and waits for its last layers to be merged; stays so where it is over before
    unmerged: bool = field(default=False, init=False)
    #: row of the block tables while it runs
    row: int = field(default=-1, init=False)
    #: what `Runtime.compress` did: after how many computed tokens, and which stay, per layer group; replayed on resuming
    compressions: list[tuple[int, list[Tensor | None]]] = field(default_factory=list, init=False, repr=False)
    #: whether its blocks no longer hold all of its tokens
    compressed: bool = field(default=False, init=False)
    #: tokens it can have at most, prompt and output, and those that end it; the runtime knows its own limits
    longest: int = field(default=0, init=False)
    stops: frozenset[int] = field(default=frozenset(), init=False)
    #: digests of the full blocks of `tokens`, as far as they were needed
    digests: list[bytes] = field(default_factory=list, init=False, repr=False)
    #: full blocks whose digest the pools know of
    published: int = field(default=0, init=False)
    #: places of the prompt where features of images stand, in order, int64 ``[n]``; the runtime finds them
    image_places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64), init=False, repr=False)
    #: what stands there, ``[n, hidden]``: made when a step first feeds one of them, kept until the request is over
    features: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.prompt_length = len(self.tokens)
        self.together = self.together or self.prompt_length

    @property
    def output(self) -> list[int]:
        """Output tokens so far."""
        return self.tokens[self.prompt_length : len(self.tokens) - self.in_flight]

    @property
    def pending(self) -> int:
        """Known tokens that the model has yet to be fed."""
        return len(self.tokens) - self.computed

    @property
    def output_length(self) -> int:
        """Number of output tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def largest(self) -> int:
        """Tokens whose keys are stored at most, were none removed: the last output token is never fed."""
        return self.prompt_length if self.scored else max(self.longest - 1, self.prompt_length)

    def branch(self, id: str, sampling: SamplingParameters) -> Request:
        """A new request that stands where this one does, with blocks yet to be given to it."""
        child = Request(list(self.prompt), sampling, together=self.together, images=self.images, id=id)
        child.image_spans, child.image_places, child.features = self.image_spans, self.image_places, self.features
        child.tokens, child.times, child.digests = list(self.tokens), list(self.times), list(self.digests)
        child.computed, child.published = self.computed, self.published
        child.prefill, child.handed_over = self.prefill, self.handed_over
        child.spared, child.merged_after, child.unmerged = self.spared, self.merged_after, self.unmerged
        child.compressed, child.compressions = self.compressed, list(self.compressions)
        return child

    def image_rows(self, start: int, end: int) -> tuple[int, int]:
        """Rows ``first .. last - 1`` of `features` that stand at tokens ``start .. end - 1``."""
        first, last = np.searchsorted(self.image_places, (start, end))
        return int(first), int(last)

    def images_digest(self, start: int, end: int) -> bytes:
        """Digests of the images that have features at tokens ``start .. end - 1``, one behind the other."""
        if not self.images:
            return b""
        each = len(self.image_places) // len(self.images)
        first, last = self.image_rows(start, end)
        return b"".join(image.digest for image in self.images[first // each : -(-last // each)] if first < last)

    def chunk(self, acts: Acts) -> int:
        """Tokens that the next step may feed at most.

        Parameters
        ----------
        acts
            When the runtime's policy acts. The prompt ends a step for any, so that the policy sees what it saw before when a
            preempted request is resumed; for one that acts after every further token, known output is fed token by token.
        """
        pending = len(self.tokens) - self.computed
        if acts is not None and self.computed < self.prompt_length:
            pending = min(pending, self.prompt_length - self.computed)
        elif acts == "decode":
            pending = 1
        if self.merged_after and self.computed < self.prompt_length + self.merged_after:
            pending = min(pending, self.prompt_length + self.merged_after - self.computed)
        for at, _ in self.compressions:
            if at > self.computed:
                return min(pending, at - self.computed)
        return pending

    def findable(self, acts: Acts) -> int:
        """First tokens whose keys may be taken from the prefix cache.

        All but the last, none at or behind a compression, and none whose hidden state is wanted. Under a policy the last of
        the prompt is computed, and the policy acts then.
        """
        tokens = (len(self.tokens) if acts is None else self.prompt_length) - max(self.scored, 1)
        return min([tokens, *(at - 1 for at, _ in self.compressions)])
