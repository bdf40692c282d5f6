"""Design points on MLC-LLM: a library and a server with the point's limits, and several requests at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import MemoryPass
from kvsuite.engines.serving import EngineView, Reach, Served, Serving, StreamProgress
from kvsuite.errors import CaseInvalid
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.formats import WeightFormat
from kvsuite.memory_model.mlc import PAGE_TOKENS, MlcMemory
from kvsuite.memory_model.prediction import Part
from kvsuite.meters.clock import ClientClock, Clock
from kvsuite.meters.memory import DriverMeter, Phase, Reading, peak_resident_set
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.workloads.windows import Window

from .client import Reply
from .metrics import between, decode_steps
from .models import Overrides
from .server import MlcServer

#: what mlc_llm wants free beside prompt and output of every running request: 10 pages for its jump-forward step, and one
SPARE_TOKENS = 11 * PAGE_TOKENS
_UNSEEN = "MLC-LLM does not say how many bytes of its pages are in use"
_NO_ALLOCATIONS = "MLC-LLM counts no allocations; memory.reported has its own estimate"
_NO_SCORES = "MLC-LLM returns no losses of a given text"
# of docs/mlc.md: NaN logits there, after which no request is ever answered
_ON_CPU = "MLC-LLM's CPU code gives NaN for {what}, and then hangs; use {mend} or a GPU (docs/mlc.md)"


class MlcServing(Serving):
    """A design point on a model of MLC.

    Parameters
    ----------
    case
        Its ``params`` are the point, its ``workload`` the requests.
    architecture
        Of the model.
    weight_format
        Of its weights.
    inert
        Axes that do not reach MLC with this model, by their names in ``params``, with the reason.
    own_config
        Whether ``mlc-chat-config.json`` is written here, with the point's values; else it is the model's own.
    effective
        Of the session: gets what the engine really applies.
    start
        Makes the server of the point: compiles its library if need be.
    device
        The torch device that the driver is asked about.
    """

    cannot_score: ClassVar[str | None] = _NO_SCORES
    memory_parts: ClassVar[Mapping[Part, str]] = {
        "parameters": "params_bytes",
        "kv_cache": "kvcache_bytes",
        "temporary": "temp_bytes",
    }

    def __init__(
        self,
        case: Case,
        architecture: Architecture,
        weight_format: WeightFormat,
        inert: Mapping[str, str],
        own_config: bool,
        effective: dict[str, Any],
        start: Callable[[Overrides, int, bool], MlcServer],
        device: Any,
    ) -> None:
        self._params, self._workload = dict(case.params), dict(case.workload)
        self._architecture, self._format, self._inert = architecture, weight_format, dict(inert)
        self._own_config = own_config
        self._effective, self._start, self._device = effective, start, device
        self._server: MlcServer | None = None
        if case.device_kind == "cpu":
            self._refuse_what_hangs()

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens that the pages have room for, by request: the context, or what a request and mlc_llm's own rule take."""
        return _tokens_per_sequence(self._params, self._workload)

    def clock(self, usual: Clock) -> Clock:
        return ClientClock()

    def floor_unknown(self) -> str | None:
        if self._device.type not in ("cpu", "cuda"):
            return f"the copy bandwidth of {self._device} cannot be measured by torch"
        if isinstance(self._architecture.weights, str):
            return self._architecture.weights
        return None

    def predictor(self, architecture: Architecture) -> MlcMemory:
        chunk = int(self._params["prefill_chunk"]) if self._own_config else None
        memory = MlcMemory.of(architecture, chunk, per_sequence=True)
        # only what is compiled can tell; the pass asks when the server is up
        library_bytes = None if self._server is None else self._server.settings.function_bytes
        return replace(memory, sequence_tokens=self.tokens_per_sequence, library_bytes=library_bytes)

    def reach(self, params: Mapping[str, Any], workload: Mapping[str, Any]) -> Reach:
        settings = {name: value for name, value in params.items() if name not in self._inert}
        settings["tokens_per_sequence"] = _tokens_per_sequence(params, workload)
        asked = {"window": int(params["window"]) > 0, "sink": int(params["sink"]) > 0}
        inert = {axis: reason for axis, reason in self._inert.items() if asked.get(axis, True)}
        return Reach(settings, inert)

    def serve(self, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Clock) -> Served:
        server = self._up()
        before = server.metrics()
        replies = server.complete(prompts, new_tokens, clock)
        after = server.metrics()
        seconds = clock.seconds()
        times = [_times(reply, prompt, new_tokens, seconds) for reply, prompt in zip(replies, prompts, strict=True)]
        counts = self._counts(before, after, times)
        return Served(
            times, [], counts, texts=[reply.text for reply in replies],
            engine=EngineView(_engine_times(replies), before, after),
        )  # fmt: skip

    def engine_metrics(self, served: Sequence[Served]) -> dict[str, float]:
        views = [one.engine for one in served if one.engine is not None]
        return between(views[0].before, views[-1].after)

    def memory_pass(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> MemoryPass:
        self.stop()
        with self._driver() as driver:
            server = self._up()
            self.serve(prompts, new_tokens, ClientClock())
        reported: dict[str, int] = dict(server.memory)
        warnings = [] if reported else ["mlc_llm printed no memory estimate"]
        nothing = [Reading(reason=_NO_ALLOCATIONS) for _ in range(6)]
        return MemoryPass(
            prefill=Phase(*nothing[:3]),
            decode=Phase(*nothing[3:]),
            resident=peak_resident_set(server.pid),
            driver=driver,
            kv_bytes_prefill=None,
            kv_bytes_decode=None,
            kv_bytes_allocated=None,
            lengths_prefill=[],
            lengths_decode=[],
            unseen=_UNSEEN,
            warnings=warnings,
            reported=reported,
        )

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int) -> int:
        return requests * self._kv_bytes(self._visible(prompt_tokens + new_tokens - 2))

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int) -> float:
        first = prompt_tokens
        seen = [self._visible(position) for position in range(first, first + new_tokens - 1)]
        return requests * self._kv_bytes(sum(seen)) / len(seen)

    def score(self, tokens: Sequence[int], windows: Sequence[Window], progress: StreamProgress | None) -> TokenScores:
        raise CaseInvalid(_NO_SCORES)

    def stop(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _up(self) -> MlcServer:
        if self._server is None:
            point = self._params
            batch = int(point["batch"])
            slides = "window" not in self._inert
            overrides = Overrides(
                context_window_size=int(point["context"]),
                prefill_chunk_size=int(point["prefill_chunk"]),
                max_batch_size=batch,
                sliding_window_size=int(point["window"]) if slides else None,
                attention_sink_size=int(point["sink"]) if slides else None,
            )
            caches = bool(self._workload["prefix_caching"])
            self._server = self._start(overrides, batch * self.tokens_per_sequence, caches)
            self._effective |= overrides.given() | self._server.limits
            self._effective |= {
                "prefix_caching": caches,
                "start_s": self._server.start_seconds,
                "own_library": self._server.settings.library is not None,
            }
        return self._server

    def _counts(
        self, before: Mapping[str, Any], after: Mapping[str, Any], times: Sequence[RequestTimes]
    ) -> dict[str, int]:
        computed = int(after["prefill_tokens_sum"] - before["prefill_tokens_sum"])
        prompts = sum(one.prompt_tokens for one in times)
        if computed > prompts:
            raise CaseInvalid(
                f"mlc_llm computed {computed} prompt tokens for prompts of {prompts}: it took requests back and began again, "
                "which it does where pages are short; lower --kv-prompt-share or the batch"
            )
        steps = decode_steps(before, after)
        return {
            "computed_prefill_tokens": computed,
            "logical_prompt_tokens": prompts,
            "prefix_hit_tokens": prompts - computed,
            "preemptions": 0,
            "decode_steps": sum(steps.values()),
            "largest_batch": max(steps, default=0),
            "chunks": sum(len(one.chunks) for one in times),
        }

    def _driver(self) -> AbstractContextManager[Reading]:
        import torch

        if self._device.type == "cuda" and not torch.cuda.is_available():
            return nullcontext(Reading(reason="this torch sees no CUDA device, and NVML is asked about torch's"))
        return DriverMeter(self._device).peak()

    def _refuse_what_hangs(self) -> None:
        batch, chunk = int(self._params["batch"]), int(self._params["prefill_chunk"])
        prompt = int(self._workload["prompt_tokens"])
        if batch > 1:
            raise CaseInvalid(_ON_CPU.format(what="requests that run together", mend="batch=1"))
        if prompt > chunk:
            mend = f"a --kv-prompt-share of at most {chunk / int(self._params['context']):.3g}"
            raise CaseInvalid(
                _ON_CPU.format(what=f"a prompt ({prompt} tokens) longer than prefill_chunk_size={chunk}", mend=mend)
            )

    def _kv_bytes(self, tokens: int) -> int:
        return tokens * self._architecture.kv_bytes_per_token(self._format.element_bytes)

    def _visible(self, position: int) -> int:
        """Tokens that the query at a position sees: MLC's window counts the sinks."""
        window = -1 if "window" in self._inert else int(self._params["window"])
        return position + 1 if window <= 0 else min(position + 1, window)


def _tokens_per_sequence(params: Mapping[str, Any], workload: Mapping[str, Any]) -> int:
    needed = int(workload["prompt_tokens"]) + int(workload["max_new_tokens"]) + SPARE_TOKENS
    return max(int(params["context"]), needed)


def _times(reply: Reply, prompt: Sequence[int], new_tokens: int, seconds: Sequence[float]) -> RequestTimes:
    """Times of a reply, its tokens counted by the server's usage alone.

    A chunk has one token, or several where the text of one was no whole UTF-8: which ones is not told, so what is missing is
    spread over the chunks behind the first.
    """
    usage = reply.usage
    if int(usage["prompt_tokens"]) != len(prompt):
        raise CaseInvalid(f"mlc_llm took a prompt of {len(prompt)} tokens for {usage['prompt_tokens']}")
    generated, chunks = int(usage["completion_tokens"]), len(reply.stamps)
    if not 0 < chunks <= generated:
        raise CaseInvalid(f"mlc_llm sent {generated} tokens in {chunks} chunks; no time of a token is known")
    if chunks == 1:
        sizes = [generated]
    else:
        ends = [(generated - 1) * part // (chunks - 1) for part in range(chunks)]
        sizes = [1, *(later - earlier for earlier, later in itertools.pairwise(ends))]
    computed = int(usage.get("extra", {}).get("prefill_tokens", len(prompt)))
    return RequestTimes(
        len(prompt), computed, [(seconds[mark], size) for mark, size in zip(reply.stamps, sizes, strict=True)]
    )


def _engine_times(replies: Sequence[Reply]) -> dict[str, float]:
    """The server's own times, means over the requests; of a request that it tells nothing of there is none."""
    extras = [reply.usage.get("extra") or {} for reply in replies]
    firsts = [float(extra["ttft_s"]) for extra in extras if "ttft_s" in extra]
    rates = [float(extra["decode_tokens_per_s"]) for extra in extras if extra.get("decode_tokens_per_s")]
    found = {}
    if len(firsts) == len(replies):
        found["engine_ttft_s"] = fmean(firsts)
    if len(rates) == len(replies):
        found["engine_tpot_s"] = fmean(1 / rate for rate in rates)
    return found
