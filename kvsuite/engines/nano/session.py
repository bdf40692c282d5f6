"""A session of the `nano` engine: transformers decoders served from paged keys and values, with cache policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.case import Case
from kvsuite.compression.base import Policy
from kvsuite.engines.cache_compression import CacheCompression, compression_of
from kvsuite.engines.cache_plan import plan
from kvsuite.engines.engine import EngineSettings, Session
from kvsuite.engines.loaded_session import LoadedSession
from kvsuite.engines.nano.memory_model import NanoMemory, prompt_kernel, stored_tokens
from kvsuite.engines.questions import Answer, Asked
from kvsuite.engines.results import (
    MemoryPass,
    Reach,
    Served,
    ServeRequest,
    TakeRow,
    TokenProgress,
    WindowProgress,
    WindowScores,
)
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import Architecture
from kvsuite.meters.clock import Clock
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.meters.quality import TokenScores
from kvsuite.nanovllm.attention_layers import attention_layers, stored_bytes
from kvsuite.nanovllm.green_contexts import SmPartition, open_partition
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.partition_ladder import PartitionLadder
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime, Stage
from kvsuite.nanovllm.sequence_rotary import passes_switch, recomputing_switch
from kvsuite.nanovllm.steering import Controller
from kvsuite.sm_split import PartitionRequest
from kvsuite.workloads.windows import Window

from .answering import answer_questions
from .formats import paged_format
from .memory import measure_memory
from .plan_controller import plan_controller
from .plan_limits import plan_limits, refuse_plan
from .point import point_limits, point_reach, visible_tokens
from .runtime import RuntimeHolder
from .scoring import WindowPassages, compare_windows, score_rows, score_text, score_windows
from .serving import exactly, serve_requests
from .under_load import serve_under_load

# requests whose full caches a dense run holds at a time, at most
_DENSE_SEQUENCES = 64


class NanoSession(LoadedSession):
    """A loaded model behind the paged runtime.

    A design point (the workload's protocol is ``serving``) is served with its own limits, as many requests at a time as its
    batch; a case with a serving plan as that says, under load. Of any other case the pool holds the requests that are served
    together, each as long as the longest.

    Parameters
    ----------
    case
        Names model, device and dtype.
    settings
        With ``decode_step=auto`` steps are captured on CUDA where the runtime can; ``implementation`` is of the caches of
        engine `hf` and does not reach this one.
    """

    def __init__(self, case: Case, settings: EngineSettings) -> None:
        # the runtime attends itself; not every model has another implementation than this one
        super().__init__(case, settings, attention="eager")
        self._facts |= {"implementation": "paged", "frees_memory": True}
        if settings.implementation != "ring":
            self.inert["impl"] = "the pool of blocks is the cache; ring and copy are caches of engine hf"
        if settings.attention != "auto":
            self.inert["attention"] = "nano attends over its pages with functions of its own"
        self._decode_step = settings.decode_step
        # refuses what paged attention is not
        self._layers = attention_layers(self._loaded.model, self._loaded.text_config)
        self._holder = RuntimeHolder(self._loaded, settings.decode_step)
        self._method = CacheCompression()
        #: layers that the policy acts on
        self._treated: frozenset[int] = frozenset()
        self._longest = 0
        #: of the prepared design point or serving plan, ``None`` for any other case
        self._limits: Limits | None = None
        self._plan: ServingPlan | None = None
        #: SMs of its lanes, where the case parts them
        self._sms: SmPartition | None = None
        #: of a plan with a controller, and the partitions that it may choose
        self._controller: Controller | None = None
        self._ladder: PartitionLadder | None = None
        self._prompt_tokens: int | None = None

    @property
    def ratio_requested(self) -> float | None:
        return self._method.ratio_requested

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int | None:
        policy = self._method.policy
        # the last token is chosen and never fed
        tokens = self._stored(prompt_tokens + new_tokens - 2)
        if policy is not None:
            kept = plan(policy, prompt_tokens, new_tokens - 1).final
            tokens = [kept if layer in self._treated else own for layer, own in enumerate(tokens)]
        return requests * self._bytes(tokens, self._format)

    def full_kv_bytes(self, tokens: int) -> int:
        return self._bytes(self._stored(tokens - 1), None)

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> float:
        positions = range(prompt_tokens, prompt_tokens + new_tokens - 1)
        windows = self._windows()
        read = [
            self._bytes([visible_tokens(*each, position) for each in windows], self._format) for position in positions
        ]
        return requests * sum(read) / len(read)

    def _windows(self) -> list[tuple[int | None, int]]:
        """Window and sinks of every layer: the model's own, or the point's."""
        limits = self._limits
        point = (None, 0) if limits is None else (limits.sliding_window, limits.attention_sinks)
        return [point if layer.window is None else (layer.window, 0) for layer in self._layers]

    def _stored(self, position: int) -> list[int]:
        """Tokens of a request in every layer without a policy, once the one at a position is stored."""
        return [stored_tokens(*each, position) for each in self._windows()]

    @property
    def _format(self) -> OwnFormat | None:
        """How the prepared case stores keys and values, ``None`` for the model's own dtype."""
        return self._holder.cache_format

    def _bytes(self, tokens_per_layer: Sequence[int], chosen: OwnFormat | None) -> int:
        return sum(stored_bytes(self._layers, tokens_per_layer, self._loaded.dtype.itemsize, chosen))

    def memory_model(self, architecture: Architecture) -> NanoMemory:
        return NanoMemory(
            architecture,
            self.dtype_name,
            self.device.type,
            self._prompt_tokens,
            cache_format=self._format,
            prompts=prompt_kernel(str(self.effective["attention"])) if "attention" in self.effective else "fa3",
        )

    def reach(self, case: Case) -> Reach:
        return point_reach(case)

    def prepare(self, case: Case) -> None:
        self.finish()
        if case.policy is not None and case.policy.startswith("kvpress:"):
            raise CaseInvalid(
                f"{case.policy} on engine nano: a press works on the dense cache of one prompt, and here sequences share "
                "blocks; use --kv-engine=hf"
            )
        length, new_tokens = (int(case.workload.get(name, 1)) for name in ("prompt_tokens", "max_new_tokens"))
        # the last token is chosen and never fed, but on CUDA a step is launched before the last one's tokens are here
        self.decoder.require_positions(length + new_tokens - (self.device.type != "cuda"))
        self.decoder.require_positions(_scored_tokens(case) - 1)
        # one token more is fed where blocks are read
        if passed := passes_switch(recomputing_switch(self._loaded.model), length, new_tokens + 1):
            raise CaseInvalid(f"engine nano: {passed}")
        if self._decode_step == "graph" and self.device.type != "cuda":
            raise CaseInvalid("--kv-decode-step=graph: CUDA graphs need a CUDA device; use auto or eager")
        self._method = compression_of(case, layers=self.decoder.layers)
        self._holder.cache_format = paged_format(case)
        policy = self._method.policy
        self.effective = self._facts | {
            "positions": policy.positions if policy else "original",
            "skip_layers": sorted(policy.skip_layers) if policy else [],
        }
        if policy is not None:
            self._restrict(policy, case, length + new_tokens + 1)
        self._longest = 0
        self._plan = ServingPlan.of(case)
        if case.partition is not None and (self._plan is None or self._plan.lanes == 1):
            raise CaseInvalid(
                "partition: SMs are parted between two lanes, and this case has one; leave the partition out"
            )
        if self._plan is not None:
            refuse_plan(self._plan, policy)
            if self._plan.controller is not None and policy is not None:
                self._control(self._plan, policy, case)
            elif case.partition is not None:
                self._sms = open_partition(PartitionRequest.of(case.partition), self.device)
                self.partition = {"requested": dict(case.partition), "realised": self._sms.to_dict()}
            self._limits = replace(plan_limits(self._plan), cache_format=self._format)
            if self._plan.stage == "async" and self.device.type == "cpu":
                self.inert["stage"] = "a CPU has one stream: a prompt is compressed at once, before the next step"
            if self._plan.lanes == 2 and self.device.type == "cpu":
                self.inert["lanes"] = "a CPU has one stream: prompts and decoding take turns"
            try:
                self._runtime((), captures=False)
            except UserError as error:
                # a pool that this case names and cannot have is no fault of the others; the runtime knows its own words for it
                words, own = str(error), f"pool_bytes={self._plan.pool_bytes}: "
                if words.startswith(own):
                    words = f"--kv-pool-bytes={self._plan.pool_bytes}: {words.removeprefix(own).partition(';')[0]}; give more"
                raise CaseInvalid(words) from error
        elif case.workload.get("protocol") == "serving":
            limits = point_limits(case.params, prefix_caching=bool(case.workload["prefix_caching"]))
            self._limits = replace(limits, cache_format=self._format)
            self._prompt_tokens = length
        else:
            # whether model and policy are something for paged blocks is to be known before anything is measured
            self._runtime([ServeRequest(range(length), new_tokens)], captures=False)

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        if any(one.arrival_s or one.scored for one in requests):
            raise ValueError(
                "serve() serves all requests at once; use serve_under_load() for arrivals and forced output"
            )
        runtime = self._runtime(requests)
        served = serve_requests(
            runtime, requests, clock, stamps_on_delivery=self._limits is None and len(requests) == 1
        )
        if clock is not None and self._limits is None:
            taken = served.counts
            self.effective["tokens"] = {
                "computed": taken["computed_prefill_tokens"] + taken["computed_decode_tokens"],
                "logical": taken["logical_prompt_tokens"] + taken["logical_output_tokens"],
                "prefix_hits": taken["prefix_hit_tokens"],
                "evicted": taken["evicted_tokens"],
                "preemptions": taken["preemptions"],
            }
        return served

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
        return serve_under_load(self._runtime(requests), requests, concurrency=concurrency)

    def serve_dense(self, requests: Sequence[ServeRequest]) -> Served:
        longest = max(len(one.prompt) + one.new_tokens + 1 for one in requests)
        limits = self._holder.limits(longest, sequences=min(len(requests), _DENSE_SEQUENCES), full=True)
        # as many blocks as they need together, where there is room for them
        limits = replace(limits, num_blocks=None)
        at_once = [replace(one, arrival_s=0.0) for one in requests]
        return serve_under_load(self._holder.get(limits, None, captures=False), at_once)

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        self._holder.drop()
        found = measure_memory(
            self._loaded,
            lambda: self._runtime(requests),
            # one token more: blocks are read while a request still runs
            [Request(list(one.prompt), exactly(one.new_tokens + 1), images=one.images) for one in requests],
            [one.new_tokens for one in requests],
            compresses=self._method.policy is not None,
            evicts=self._method.acts_in_decode,
        )
        found.warnings += self._method.caveats(min(len(one.prompt) for one in requests))
        return found

    def score(
        self, tokens: Sequence[int], protocol: str, prefix: int, progress: TokenProgress | None = None
    ) -> TokenScores:
        self.decoder.require_positions(len(tokens) - 1)
        return score_text(self._holder, self._method.policy, tokens, protocol, prefix, progress)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        self.decoder.require_positions(len(tokens) - 1)
        return score_rows(self._holder, tokens, first, len(tokens), full=True)

    def score_rows(
        self,
        tokens: Sequence[int],
        protocol: str,
        prefix: int,
        take: TakeRow,
        *,
        full: bool,
        progress: TokenProgress | None = None,
    ) -> TokenScores:
        self.decoder.require_positions(len(tokens) - 1)
        return score_text(self._holder, self._method.policy, tokens, protocol, prefix, progress, take, full=full)

    def answer(
        self, asked: Sequence[Asked], *, full: bool, progress: TokenProgress | None = None
    ) -> list[list[Answer]]:
        longest = max(len(one.context) + one.steps for one in asked)
        self.decoder.require_positions(longest)
        limits = self._holder.limits(longest + 1, sequences=max(len(one.questions) for one in asked), full=full)
        runtime = self._holder.get(limits, None if full else self._method.policy, captures=False)
        return answer_questions(runtime, asked, progress)

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
        self.decoder.require_positions(given.longest)
        return score_windows(given, given.runtime(self._holder, self._limits), progress)

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
        self.decoder.require_positions(given.longest)
        sizes = self.vocab_size, reference.vocab_size
        return compare_windows(given, (self._holder, reference._holder), sizes, progress)

    def finish(self) -> None:
        self._holder.drop()
        for opened in (self._sms, self._ladder):
            # behind the runtime whose streams have these SMs
            if opened is not None:
                opened.close()
        self._sms = self._ladder = self._controller = None
        self.partition = {"requested": None, "realised": None}
        for axis in ("stage", "lanes", "auto_dual", "async_compress", "compression_streams"):
            self.inert.pop(axis, None)
        self._method = CacheCompression()
        self._holder.cache_format = None
        self._treated = frozenset()
        self._limits = self._prompt_tokens = self._plan = None

    def close(self) -> None:
        self.finish()
        del self._loaded, self.decoder, self._holder

    def _control(self, plan: ServingPlan, policy: Policy, case: Case) -> None:
        """Make the controller of a plan, and open all partitions that it may choose.

        Raises
        ------
        CaseInvalid
            If the case names a partition too, or the decisions to replay do not fit.
        CaseSkipped
            If nobody here can part the device.
        UserError
            If the file of decisions cannot be read.
        """
        if case.partition is not None:
            raise CaseInvalid(
                f"partition {dict(case.partition)}: the controller chooses the SMs itself, and would replace what is given at "
                "its first decision; leave the partition out, or use greenctx-only"
            )
        self._ladder = PartitionLadder(self.device)
        self.partition = {"requested": None, "realised": self._ladder.to_dict()}
        self._controller = plan_controller(
            plan,
            policy,
            name=case.name,
            layers=self._layers,
            element_bytes=self._loaded.dtype.itemsize,
            cache_format=self._format,
            weight_bytes=int(self.model["step_weight_bytes"] or self.model["weights_bytes"]),
            bandwidth=self.bandwidth,
        )
        self.effective["controller"] = self._controller.log[0]["settings"]

    def _restrict(self, policy: Policy, case: Case, longest: int) -> None:
        """Let a policy act on layers that see everything: in all passes of the case the same ones.

        A window that neither the speed pass (``longest`` tokens) nor a text outgrows is none.
        """
        longest = max(longest, _scored_tokens(case))
        windows = {
            index: layer.window
            for index, layer in enumerate(self._layers)
            if layer.window is not None and layer.window < longest
        }
        self._treated = frozenset(range(len(self._layers))).difference(policy.skip_layers, windows)
        if not windows:
            return
        if not self._treated:
            raise CaseInvalid(
                f"policy {policy.name}: the model's own sliding window of {max(windows.values())} is shorter than the "
                f"{longest} tokens of the longest sequence, and no other layer is left for the policy; take shorter texts and "
                "prompts (--kv-max-tokens, --kv-prompt-tokens) or a model with layers of full attention"
            )
        self._method.policy = replace(policy, skip_layers={*policy.skip_layers, *windows})
        self.effective["policy_layers"] = sorted(self._treated)

    def _runtime(self, requests: Sequence[ServeRequest], *, captures: bool = True) -> Runtime:
        """The runtime of the point or plan, or of these requests: its pool holds as many of the longest, and a token more."""
        if self._limits is not None:
            stage: Stage = "async" if self._plan is not None and self._plan.stage == "async" else "sync"
            runtime = self._holder.get(
                self._limits,
                self._method.policy,
                captures=captures,
                stage=stage,
                lanes=1 if self._plan is None else self._plan.lanes,
                partition=self._sms,
                controller=self._controller,
                partitions=None if self._ladder is None else self._ladder.by_ratio,
                layers_per_step=None if self._plan is None else self._plan.layers_per_step,
            )
            if runtime.controller is not None:
                self.inert |= runtime.controller.inert
            self._holder.state(runtime, self.effective)
            self.effective |= {
                "sliding_window": runtime.limits.sliding_window,
                "attention_sinks": runtime.limits.attention_sinks,
                "prefill_first": runtime.limits.prefill_first,
            }
            return runtime
        self._longest = max(self._longest, *(len(one.prompt) + one.new_tokens + 1 for one in requests))
        limits = self._holder.limits(self._longest, sequences=len(requests))
        runtime = self._holder.get(limits, self._method.policy, captures=captures)
        self._holder.state(runtime, self.effective)
        return runtime


def _scored_tokens(case: Case) -> int:
    """Tokens of the longest text that the case scores through its cache."""
    prefix = int(case.workload.get("prompt_tokens", 0)) if case.workload.get("protocol") == "prefix-continuation" else 0
    return prefix + int(case.workload.get("max_tokens", 0))
