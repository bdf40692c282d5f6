"""Design points on the `nano` engine: a runtime with the point's limits, and several requests at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvsuite.case import Case
from kvsuite.engines.engine import MemoryPass
from kvsuite.engines.hf.decoder import Decoder
from kvsuite.engines.serving import Reach, Served, Serving, StreamProgress
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.nano import NanoMemory, pool_blocks
from kvsuite.meters.clock import Clock
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.nanovllm.scoring import score_passages
from kvsuite.workloads.windows import Window

from .memory import measure_memory
from .runtime import BLOCK_SIZE, RuntimeHolder
from .scoring import WindowPassages

_NEVER_SLIDES = "the window never slides: it is no shorter than the context"


class NanoServing(Serving):
    """A design point on a loaded model.

    Parameters
    ----------
    case
        Its ``params`` are the point, its ``workload`` the requests.
    loaded, decoder, holder
        Of the session.
    effective
        Of the session: gets what the runtime really applies.
    """

    def __init__(
        self, case: Case, loaded: LoadedModel, decoder: Decoder, holder: RuntimeHolder, effective: dict[str, Any]
    ) -> None:
        self._loaded, self._decoder, self._holder, self._effective = loaded, decoder, holder, effective
        self._prompt_tokens = int(case.workload["prompt_tokens"])
        self.limits = point_limits(case.params, prefix_caching=bool(case.workload["prefix_caching"]))

    def predictor(self, architecture: Architecture) -> NanoMemory:
        loaded = self._loaded
        dtype = str(loaded.dtype).removeprefix("torch.")
        return NanoMemory(architecture, dtype, loaded.device.type, self._prompt_tokens)

    def reach(self, params: Mapping[str, Any], workload: Mapping[str, Any]) -> Reach:
        limits = point_limits(params, prefix_caching=bool(workload["prefix_caching"]))
        inert = {}
        prompts = int(params["batch"]) * int(workload["prompt_tokens"])
        if int(params["prefill_chunk"]) >= prompts:
            # the pool of a window has room for a chunk; elsewhere nothing else looks at the limit
            whole = point_limits({**params, "prefill_chunk": prompts}, prefix_caching=limits.prefix_caching)
            if whole.num_blocks == limits.num_blocks:
                limits = whole
                inert["prefill_chunk"] = f"it never splits a step: all prompts together have {prompts} tokens"
        if int(params["window"]) > 0 and limits.sliding_window is None:
            inert["window"] = _NEVER_SLIDES
            if int(params["sink"]):
                inert["sink"] = _NEVER_SLIDES
        settings = {
            "context": limits.max_model_len,
            "step_tokens": limits.max_num_batched_tokens,
            "batch": limits.max_num_seqs,
            "window": limits.sliding_window,
            "sink": limits.attention_sinks,
            "num_blocks": limits.num_blocks,
        }
        return Reach(settings, inert)

    def serve(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Clock) -> Served:
        runtime = self._runtime(captures=True)
        before = runtime.counters.to_dict()
        requests = [Request(list(prompt), _exactly(new_tokens)) for prompt in prompts]
        stamps = _Stamps(clock, runtime)
        runtime.on_logits = stamps.on_logits
        try:
            clock.start()
            for request in requests:
                runtime.add(request)
            while runtime.unfinished:
                runtime.step()
                stamps.after_step()
            seconds = clock.seconds()
        finally:
            runtime.on_logits = None
            for request in requests:
                runtime.cancel(request)
        for request in requests:
            if request.status is not Status.FINISHED:
                raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
        counts = {name: count - before[name] for name, count in runtime.counters.to_dict().items()}
        counts |= {
            "prefill_steps": counts["steps"] - stamps.decode_steps,
            "decode_steps": stamps.decode_steps,
            "largest_batch": stamps.largest_batch,
        }
        return Served([stamps.times(r, seconds) for r in requests], [r.output for r in requests], counts)

    def memory_pass(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> MemoryPass:
        self._holder.drop()
        requests = [Request(list(prompt), _exactly(new_tokens + 1)) for prompt in prompts]
        return measure_memory(self._loaded, lambda: self._runtime(captures=True), requests, new_tokens)

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int) -> int:
        # the last token is chosen and never fed
        return requests * self._kv_bytes(self._stored(prompt_tokens + new_tokens - 2))

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int) -> float:
        positions = range(prompt_tokens, prompt_tokens + new_tokens - 1)
        visible = [self._visible(position) for position in positions]
        return requests * self._kv_bytes(1) * sum(visible) / len(visible)

    def score(self, tokens: Sequence[int], windows: Sequence[Window], progress: StreamProgress | None) -> TokenScores:
        given = WindowPassages(self._loaded, tokens, windows, "none", None)
        limits = replace(self.limits, prefix_caching=False)
        runtime = self._holder.get(limits, None, captures=False)
        found = score_passages(runtime, given.passages, progress=progress)
        return TokenScores(given.text.target_ids, given.text.positions, found.nll, found.correct)

    def _runtime(self, *, captures: bool) -> Runtime:
        runtime = self._holder.get(self.limits, None, captures=captures)
        limits = runtime.limits
        self._holder.state(runtime, self._effective)
        self._effective |= {
            "sliding_window": limits.sliding_window,
            "attention_sinks": limits.attention_sinks,
            "prefill_first": limits.prefill_first,
        }
        return runtime

    def _kv_bytes(self, tokens: int) -> int:
        return self._decoder.kv_bytes([tokens] * self._decoder.layers)

    def _visible(self, position: int) -> int:
        """Tokens that the query at a position sees, its own among them."""
        window = self.limits.sliding_window
        return position + 1 if window is None else min(position + 1, window + self.limits.attention_sinks)

    def _stored(self, position: int) -> int:
        """Tokens that a decoding request holds once the one at a position is stored: whole blocks leave the window."""
        window, size = self.limits.sliding_window, self.limits.block_size
        if window is None:
            return position + 1
        sinks = -(-self.limits.attention_sinks // size) * size
        return position + 1 - max(0, (position + 1 - window - sinks) // size) * size


def point_limits(params: Mapping[str, Any], *, prefix_caching: bool) -> Limits:
    """Limits of a design point: the pool holds ``batch`` sequences of the context, or of what a sliding window leaves.

    Prompts are fed before anything decodes, so that all sequences decode at the same time.

    Parameters
    ----------
    params
        ``context``, ``prefill_chunk``, ``batch``, ``window`` (-1: none) and ``sink``.
    prefix_caching
        Whether blocks are found again by their tokens.
    """
    context, batch, window = (int(params[name]) for name in ("context", "batch", "window"))
    # every running sequence has a token in a step
    step = max(int(params["prefill_chunk"]), batch)
    slides = 0 < window < context
    sinks = int(params["sink"]) if slides else 0
    blocks = pool_blocks(
        context=context, sequences=batch, chunk=step, window=window if slides else None, sinks=sinks,
        block_tokens=BLOCK_SIZE,
    )  # fmt: skip
    return Limits(
        max_model_len=context,
        max_num_seqs=batch,
        max_num_batched_tokens=step,
        block_size=BLOCK_SIZE,
        num_blocks=blocks,
        prefix_caching=prefix_caching,
        sliding_window=window if slides else None,
        attention_sinks=sinks,
        prefill_first=True,
    )


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


def _exactly(new_tokens: int) -> SamplingParameters:
    return SamplingParameters(max_new_tokens=new_tokens, ignore_eos=True)
