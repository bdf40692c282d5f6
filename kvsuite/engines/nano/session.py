"""A session of the `nano` engine: transformers decoders served from paged keys and values, with cache policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.cache_method import Method, method_for
from kvsuite.engines.engine import MemoryPass, Session
from kvsuite.engines.hf.cache_plan import plan
from kvsuite.engines.loaded_session import LoadedSession
from kvsuite.engines.window_scoring import Progress as WindowProgress
from kvsuite.engines.window_scoring import WindowScores
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.meters.clock import Clock
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters
from kvsuite.workloads.windows import Window

from .memory import measure_memory
from .runtime import RuntimeHolder
from .scoring import WindowPassages, compare_windows, score_rows, score_text, score_windows
from .serving import NanoServing


class NanoSession(LoadedSession):
    """A loaded model behind the paged runtime.

    Parameters
    ----------
    case
        Names model, device and dtype.
    seed
        Seed of a dummy model's weights.
    threads
        CPU threads, ``None`` for the probe.
    decode_step
        ``eager``, ``graph``, or ``auto``: captured on CUDA where the runtime can.
    implementation
        Of the ``hf`` engine's caches: does not reach this one.
    cache_dir
        Where converted models lie.
    """

    def __init__(
        self,
        case: Case,
        *,
        seed: int = 0,
        threads: int | None = None,
        decode_step: str = "auto",
        implementation: str = "ring",
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(case, attention="sdpa", seed=seed, threads=threads, cache_dir=cache_dir)
        self._facts |= {"implementation": "paged", "frees_memory": True}
        if implementation != "ring":
            self.inert["impl"] = "the pool of blocks is the cache; ring and copy are caches of engine hf"
        self._decode_step = decode_step
        self._holder = RuntimeHolder(self._loaded, decode_step)
        self._method = Method()
        self._longest = 0

    @property
    def ratio_requested(self) -> float | None:
        return self._method.ratio_requested

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int) -> int | None:
        policy, layers = self._method.policy, range(self.decoder.layers)
        skipped = policy.skip_layers if policy else layers
        finals = [
            plan(policy if layer not in skipped else None, prompt_tokens, new_tokens - 1).final for layer in layers
        ]
        return self.decoder.kv_bytes(finals)

    def prepare(self, case: Case) -> None:
        self.finish()
        if case.partition is not None:
            raise CaseInvalid("SM partitions are not part of engine nano yet; leave the partition out")
        if case.policy is not None and case.policy.startswith("kvpress:"):
            raise CaseInvalid(
                f"{case.policy} on engine nano: a press works on the dense cache of one prompt, and here sequences share "
                "blocks; use --kv-engine=hf"
            )
        length, new_tokens = (int(case.workload.get(name, 1)) for name in ("prompt_tokens", "max_new_tokens"))
        window = self.decoder.sliding_window
        if window and (case.policy is not None or window < length + new_tokens):
            raise CaseInvalid(
                f"the model has its own sliding window of {window}: the bytes of a cache, and what a policy does to it, would "
                "be measured on top of it; use a model without one, or no policy and a shorter --kv-prompt-tokens"
            )
        if self._decode_step == "graph" and self.device.type != "cuda":
            raise CaseInvalid("--kv-decode-step=graph: CUDA graphs need a CUDA device; use auto or eager")
        self._method = method_for(case, layers=self.decoder.layers)
        policy = self._method.policy
        self.effective = self._facts | {
            "positions": policy.positions if policy else "original",
            "skip_layers": sorted(policy.skip_layers) if policy else [],
        }
        self._longest = 0
        if case.workload.get("protocol") != "serving":
            # whether model and policy are something for paged blocks is to be known before anything is measured
            self._serving(length, new_tokens, captures=False)

    def serving(self, case: Case) -> NanoServing:
        return NanoServing(case, self._loaded, self.decoder, self._holder, self.effective)

    def generate(self, prompt: Sequence[int], new_tokens: int, clock: Clock) -> RequestTimes:
        runtime = self._serving(len(prompt), new_tokens)
        before = runtime.counters.to_dict()
        ends_prefill = True

        def on_logits(requests: Sequence[Request], logits: Any) -> None:
            # work that was submitted reaches to the chosen token; under overlap the host is told one step later
            nonlocal ends_prefill
            if ends_prefill:
                clock.mark()
            if runtime.overlap:
                clock.mark()
            ends_prefill = False

        def on_token(request: Request, token: int, at: float) -> None:
            if not runtime.overlap:
                clock.mark()

        request = Request(list(prompt), _exactly(new_tokens), on_token=on_token)
        runtime.on_logits = on_logits
        try:
            clock.start()
            runtime.run([request])
            prefill_end, *times = clock.seconds()
        finally:
            runtime.on_logits = None
            runtime.cancel(request)
        self.last_tokens = _output(request)
        after = runtime.counters.to_dict()
        taken = {name: after[name] - before[name] for name in after}
        self.effective["tokens"] = {
            "computed": taken["computed_prefill_tokens"] + taken["computed_decode_tokens"],
            "logical": taken["logical_prompt_tokens"] + taken["logical_output_tokens"],
            "prefix_hits": taken["prefix_hit_tokens"],
            "evicted": taken["evicted_tokens"],
            "preemptions": taken["preemptions"],
        }
        return RequestTimes(
            len(prompt), taken["computed_prefill_tokens"], [(at, 1) for at in times], prefill_end=prefill_end
        )

    def generate_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        runtime = self._serving(len(prompt), new_tokens)
        [request] = runtime.run([Request(list(prompt), _exactly(new_tokens))])
        return _output(request)

    def memory_pass(self, prompt: Sequence[int], new_tokens: int) -> MemoryPass:
        self._holder.drop()
        found = measure_memory(
            self._loaded,
            lambda: self._serving(len(prompt), new_tokens),
            [Request(list(prompt), _exactly(new_tokens + 1))],
            new_tokens,
            compresses=self._method.policy is not None,
        )
        found.predicted["weights_bytes"] = self.model["weights_bytes"]
        return found

    def score(self, tokens: Sequence[int], protocol: str, prefix: int, progress: Any = None) -> TokenScores:
        return score_text(self._holder, self._method.policy, tokens, protocol, prefix, progress)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        return score_rows(self._holder, tokens, first)

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        given = WindowPassages(self._loaded, tokens, windows, prefix, prefix_token)
        return score_windows(self._loaded, self._holder, given, progress)

    def compare_windows(
        self,
        reference: Session,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> TokenDivergence:
        if not isinstance(reference, NanoSession):
            raise UserError("--kv-reference: only two models of engine nano can be compared position by position")
        given = WindowPassages(self._loaded, tokens, windows, prefix, prefix_token)
        sizes = self.vocab_size, reference.vocab_size
        return compare_windows(given, (self._holder, reference._holder), sizes, progress)

    def finish(self) -> None:
        self._holder.drop()
        self._method = Method()

    def close(self) -> None:
        self.finish()
        del self._loaded, self.decoder, self._holder

    def _serving(self, prompt_tokens: int, new_tokens: int, *, captures: bool = True) -> Runtime:
        """The runtime of one request at a time; its pool holds the longest one so far, and one token more."""
        self._longest = max(self._longest, prompt_tokens + new_tokens + 1)
        runtime = self._holder.get(self._holder.limits(self._longest), self._method.policy, captures=captures)
        self._holder.state(runtime, self.effective)
        return runtime


def _exactly(new_tokens: int) -> SamplingParameters:
    return SamplingParameters(max_new_tokens=new_tokens, ignore_eos=True)


def _output(request: Request) -> list[int]:
    """Output of a request that was served to its end.

    Raises
    ------
    RuntimeError
        If it was not, with the reason.
    """
    if request.status is not Status.FINISHED:
        raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
    return request.output
