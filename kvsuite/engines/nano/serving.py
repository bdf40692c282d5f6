"""Requests on a runtime of the `nano` engine, one or several at once, with a stamp for every token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvsuite.engines.results import Served, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import Clock
from kvsuite.meters.timing import RequestTimes
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters


def serve_requests(
    runtime: Runtime, requests: Sequence[ServeRequest], clock: Clock | None, *, stamps_on_delivery: bool
) -> Served:
    """Serve requests that come all at once.

    Parameters
    ----------
    runtime
        Has nothing else to do.
    requests
        What is wanted.
    clock
        Of the stamps, ``None`` for none.
    stamps_on_delivery
        Whether a token is there when its request has it; else when the step that brought it, and those of other requests,
        is over. Where the next step is launched before the tokens of the one before are here, both are the point that the
        submitted work reaches.

    Raises
    ------
    CaseInvalid
        If one can never be served: it is too long, or its images are not what its prompt says.
    RuntimeError
        If one is not served to its end, with the reason.
    """
    before = runtime.counters.to_dict()
    stamps = None if clock is None else _Stamps(clock, runtime)
    own = [Request(list(one.prompt), exactly(one.new_tokens), images=one.images) for one in requests]
    if stamps is not None:
        runtime.on_logits = stamps.on_logits
        for request in own if stamps_on_delivery else ():
            request.on_token = stamps.on_token
    seconds: list[float] = []
    try:
        if clock is not None:
            clock.start()
        for request in own:
            if runtime.add(request).status is Status.FAILED:
                raise CaseInvalid(f"request of {request.prompt_length} tokens: {request.reason}")
        while runtime.unfinished:
            runtime.step()
            if stamps is not None:
                stamps.after_step()
        if clock is not None:
            seconds = clock.seconds()
    finally:
        runtime.on_logits = None
        for request in own:
            runtime.cancel(request)
    runtime.refuse_vectors()
    for request in own:
        if request.status is not Status.FINISHED:
            raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
    counts = {name: count - before[name] for name, count in runtime.counters.to_dict().items()}
    if stamps is None:
        return Served([], [request.output for request in own], counts)
    counts |= {
        "prefill_steps": counts["steps"] - stamps.decode_steps,
        "decode_steps": stamps.decode_steps,
        "largest_batch": stamps.largest_batch,
    }
    return Served([stamps.times(one, seconds) for one in own], [one.output for one in own], counts)


def exactly(new_tokens: int) -> SamplingParameters:
    """Greedy, so many tokens, whatever they are."""
    return SamplingParameters(max_new_tokens=new_tokens, ignore_eos=True)


class _Stamps:
    """A stamp for every step that gives tokens, and which of them are whose."""

    def __init__(self, clock: Clock, runtime: Runtime) -> None:
        self._clock, self._runtime = clock, runtime
        self._marks = 0
        self._waiting: list[Request] = []
        self._prefill_ends: dict[Request, int] = {}
        self._tokens: dict[Request, list[int]] = {}
        #: steps that gave tokens and no request its first one: prompts are fed apart
        self.decode_steps = 0
        #: most requests that such a step gave a token
        self.largest_batch = 0

    def on_logits(self, requests: Sequence[Request], logits: Tensor) -> None:
        first = [request for request in requests if request not in self._prefill_ends]
        if first:
            mark = self._mark()
            self._prefill_ends |= dict.fromkeys(first, mark)
        else:
            self.decode_steps += 1
            self.largest_batch = max(self.largest_batch, len(requests))
        self._waiting = list(requests)
        if self._runtime.overlap:
            # work that was submitted reaches to the chosen tokens; the host is told one step later
            self.after_step()

    def on_token(self, request: Request, token: int, at: float) -> None:
        self.after_step()

    def after_step(self) -> None:
        if self._waiting:
            mark = self._mark()
            for request in self._waiting:
                self._tokens.setdefault(request, []).append(mark)
            self._waiting = []

    def times(self, request: Request, seconds: Sequence[float]) -> RequestTimes:
        return RequestTimes(
            request.prompt_length,
            request.prompt_length - request.prefix_hits,
            [(seconds[mark], 1) for mark in self._tokens[request]],
            prefill_end=seconds[self._prefill_ends[request]],
        )

    def _mark(self) -> int:
        self._clock.mark()
        self._marks += 1
        return self._marks - 1
