"""A session of the `vllm` engine: one model, served by vLLM in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from kvsuite.cache_formats.cache_format import AUTO
from kvsuite.case import Case
from kvsuite.engines.capabilities import refuse_load, require_plain
from kvsuite.engines.engine import EngineSettings, Session
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
from kvsuite.errors import CaseInvalid
from kvsuite.memory_model.config import Architecture, architecture_of
from kvsuite.memory_model.formats import ELEMENT_BYTES, nano_format
from kvsuite.meters.clock import Clock
from kvsuite.meters.memory import DriverMeter, peak_resident_set
from kvsuite.meters.quality import TokenScores
from kvsuite.models.load import load_tokenizer, tokenizer_hash
from kvsuite.models.resolve import resolve_model
from kvsuite.quantization.registry import NONE
from kvsuite.workloads.windows import Window

from .install import VllmInstall
from .limits import VllmLimits, plan_blocks, point_reach
from .memory_model import BLOCK_TOKENS, NULL_BLOCKS, VllmMemory, pool_unknown
from .model_folder import checkpoint_dtype, is_quantised, model_folder
from .options import VllmOptions
from .scoring import score_windows, take_rows, text_scores
from .serving import memory_pass, served_requests
from .stamped_clock import StepClock
from .start_log import started
from .stored_format import element_bytes, stored_format
from .under_load import served_under_load
from .worker_process import VllmWorker


@dataclass(frozen=True)
class EngineKind:
    """What makes another engine.

    Parameters
    ----------
    limits
        See there.
    stored
        vLLM's name of the format of keys and values.
    gives_rows
        Whether log-probabilities of the whole vocabulary are wanted; it serves nobody then.
    """

    limits: VllmLimits
    stored: str
    gives_rows: bool = False


class VllmSession(Session):
    """A model for vLLM; cases whose limits differ get an engine of their own, all of one process.

    Parameters
    ----------
    case
        Names model, device and dtype.
    install
        The vLLM that runs it.
    settings
        Without ``threads`` vLLM chooses.
    own
        The engine's options.
    """

    lacks: ClassVar[Mapping[type, str]] = {}

    def __init__(self, case: Case, install: VllmInstall, settings: EngineSettings, own: VllmOptions) -> None:
        super().__init__()
        if settings.decode_step == "graph" and case.device_kind != "cuda":
            raise CaseInvalid("--kv-decode-step=graph: CUDA graphs need a CUDA device; use auto or eager")
        self._is_eager = settings.decode_step == "eager" or case.device_kind == "cpu"
        if own.vllm_max_capture_size is not None and self._is_eager:
            why = "with --kv-decode-step=eager" if settings.decode_step == "eager" else "on a CPU"
            raise CaseInvalid(
                f"--kv-vllm-max-capture-size={own.vllm_max_capture_size}: {why} no step is captured; leave it out"
            )
        self._install, self._settings, self._own = install, settings, own
        self._device_name = case.device
        self._spec = resolve_model(case.model, cache_dir=settings.cache_dir)
        self._architecture = architecture_of(case.model, cache_dir=settings.cache_dir)
        if reason := pool_unknown(self._architecture):
            raise CaseInvalid(f"engine vllm: {reason}; its pool cannot be sized for a case. Use --kv-engine=hf")
        self._model = model_folder(self._spec, settings.cache_dir)
        if is_quantised(Path(self._model)):
            raise CaseInvalid(
                f"--kv-model={case.model}: its weights are quantised, and engine vllm counts those of one dtype; give "
                "the checkpoint that was not quantised"
            )
        self._dtype = checkpoint_dtype(Path(self._model)) if case.dtype == "checkpoint" else case.dtype
        self._tokenizer = load_tokenizer(self._spec, cache_dir=settings.cache_dir)
        self._worker: VllmWorker | None = None
        self._running: dict[str, Any] | None = None
        self._facts: dict[str, Any] = {}
        self._case = case
        self.model = self._model_facts()
        if settings.implementation != "ring":
            self.inert["impl"] = "the blocks of vLLM are the cache; ring and copy are caches of engine hf"
        if settings.attention != "auto":
            self.inert["attention"] = "vLLM attends with its own backends: --kv-vllm-attention-backend"
        if settings.seed and self._spec.is_dummy:
            self.inert["seed"] = "vLLM draws the random weights of a dummy itself"

    @property
    def device(self) -> Any:
        import torch

        return torch.device(self._device_name)

    @property
    def dtype_name(self) -> str:
        return self._dtype

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self._architecture.vocabulary

    @property
    def bandwidth(self) -> float:
        # every card reads its own part at the same time
        return super().bandwidth * self._own.vllm_tensor_parallel_size

    def prepare(self, case: Case) -> None:
        stored_format(case)
        self._case = case
        self.effective = {
            "device": self._device_name,
            "dtype": self._dtype,
            "weight_format": NONE,
            "threads": self._settings.threads,
        }
        plan = ServingPlan.of(case)
        self.inert.pop("prompts_first", None)
        if plan is None:
            return
        if plan.stage != "none" or plan.lanes == 2:
            raise CaseInvalid("engine vllm has no compression stage and one lane; use --kv-engine=nano")
        if self._own.vllm_pool_bytes is not None:
            raise CaseInvalid(
                f"--kv-vllm-pool-bytes={self._own.vllm_pool_bytes}: under load every engine and variant has the pool of "
                "--kv-pool-blocks or --kv-pool-bytes; give one of these"
            )
        memory = self._memory_model()
        # the plan's pool; vLLM says them again when it has started, with block 0
        blocks = plan_blocks(plan, block_tokens=self._block_tokens, block_bytes=memory.block_bytes * memory.cards)
        self.effective |= {"num_blocks": blocks, "block_size": self._block_tokens}
        if plan.prompts_first:
            self.inert["prompts_first"] = "vLLM feeds prompts beside decoding requests, up to --kv-step-tokens a step"

    def clock(self, usual: Clock) -> Clock:
        return StepClock()

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        refuse_load(requests, "vllm")
        self._require_batch(requests)
        return served_requests(self._ask("serve", requests=_sent(requests)), requests, timed=clock is not None)

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
        require_plain(requests, "vllm", concurrency)
        asked = [sent | {"arrival_s": one.arrival_s} for sent, one in zip(_sent(requests), requests, strict=True)]
        return served_under_load(self._ask("load", requests=asked, concurrency=concurrency), requests)

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        self._require_batch(requests)
        with DriverMeter(self.device).peak() as driver:
            worker = self._up()
            answer = self._ask("memory", requests=_sent(requests))
            resident = peak_resident_set(worker.pid)
        limits, memory = VllmLimits.of(self._case), self._memory_model()
        blocks = memory.blocks(context=limits.max_model_len, sequences=limits.max_num_seqs)
        found = memory_pass(
            answer, self._facts, token_bytes=self._token_bytes, layers=self._architecture.layers, resident=resident,
            driver=driver,
        )  # fmt: skip
        found.predicted = {"pool_bytes": blocks * memory.block_bytes * memory.cards, "pool_blocks": blocks}
        if found.reported["pool_bytes"] != found.predicted["pool_bytes"]:
            found.warnings.append(
                f"the pools hold {found.reported['pool_bytes']} bytes, {found.predicted['pool_bytes']} were predicted"
            )
        return found

    def score(
        self, tokens: Sequence[int], protocol: str, prefix: int, progress: TokenProgress | None = None
    ) -> TokenScores:
        return self._scored(tokens, protocol, prefix, stored_format(self._case), None)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        served = VllmLimits.of(self._case)
        # the engine that serves takes the text where it is of the model's dtype and long enough
        limits = served if served.max_model_len >= len(tokens) else replace(served, max_model_len=len(tokens))
        return text_scores(
            lambda sequences: self._ask("score", EngineKind(limits, AUTO), sequences=sequences)["scores"],
            tokens, first, self.vocab_size,
        )  # fmt: skip

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
        return self._scored(tokens, protocol, prefix, AUTO if full else stored_format(self._case), take)

    def _scored(
        self, tokens: Sequence[int], protocol: str, prefix: int, stored: str, take: TakeRow | None
    ) -> TokenScores:
        """Losses by an engine whose every step feeds one token; the rows behind them if somebody takes them."""
        kind = EngineKind(VllmLimits.token_by_token(len(tokens)), stored, gives_rows=True)
        first = prefix + 1 if protocol == "prefix-continuation" else 1
        given = {} if take is None else {"rows": True}
        found = text_scores(
            lambda sequences: self._ask("score", kind, sequences=sequences, **given)["scores"],
            tokens, first, self.vocab_size,
        )  # fmt: skip
        if take is not None:
            take_rows(
                lambda at, count: self._ask("rows", kind, first=at, count=count), take, len(found.nll), self.vocab_size
            )
        return found

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        limits = VllmLimits.of(self._case)
        return score_windows(
            lambda sequences: self._ask("score", sequences=sequences)["scores"],
            tokens, windows, prefix=prefix, prefix_token=prefix_token, vocabulary=self.vocab_size,
            at_once=limits.max_num_seqs, progress=progress,
        )  # fmt: skip

    def reach(self, case: Case) -> Reach:
        return point_reach(case, self._block_tokens)

    def full_kv_bytes(self, tokens: int) -> int:
        return tokens * self._architecture.kv_bytes_per_token(ELEMENT_BYTES[self._dtype])

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int:
        return requests * (prompt_tokens + new_tokens - 1) * self._token_bytes

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> float:
        lengths = range(prompt_tokens + 1, prompt_tokens + new_tokens)
        return requests * self._token_bytes * sum(lengths) / len(lengths)

    def memory_model(self, architecture: Architecture) -> VllmMemory:
        return self._memory_model()

    def close(self) -> None:
        self._running = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _up(self, kind: EngineKind | None = None) -> VllmWorker:
        """The worker, with an engine of such a kind, by default the one that serves the case."""
        chosen = kind or self._serving
        wanted = self._arguments(chosen)
        if self._running == wanted and self._worker is not None:
            self._state(chosen)
            return self._worker
        own = self._own
        if self._worker is None:
            self._worker = VllmWorker(self._install, self._environment(), own.vllm_timeout)
            self._refuse_unknown(self._worker.hello)
        elif self._running is not None:
            self._running = None
            self._ask_worker("stop")
        before = len(self._worker.printed())
        begin = time.monotonic()
        self._facts = self._ask_worker("start", settings=wanted)
        self._facts["start_s"] = time.monotonic() - begin
        self._facts |= {"import_s": self._worker.hello["import_s"]} | started(self._worker.printed()[before:])
        self._running = wanted
        self._state(chosen)
        return self._worker

    def _ask(self, do: str, kind: EngineKind | None = None, **arguments: Any) -> dict[str, Any]:
        self._up(kind)
        return self._ask_worker(do, **arguments)

    def _ask_worker(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._worker is not None
        try:
            return self._worker.ask(do, **arguments)
        except BaseException:
            # an engine that failed has ended, and what was asked of it cannot be taken back
            self._running = None
            if self._worker.has_ended:
                self._worker.close()
                self._worker = None
            raise

    def _arguments(self, kind: EngineKind) -> dict[str, Any]:
        """Arguments of `LLM`."""
        case, own, limits, memory = self._case, self._own, kind.limits, self._memory_model(kind.stored)
        plan = ServingPlan.of(case)
        blocks = memory.blocks(context=limits.max_model_len, sequences=limits.max_num_seqs)
        if plan is not None:
            blocks = NULL_BLOCKS + plan_blocks(
                plan, block_tokens=self._block_tokens, block_bytes=memory.block_bytes * memory.cards
            )
        given: dict[str, Any] = {
            "model": self._model,
            "skip_tokenizer_init": True,
            "load_format": "dummy" if self._spec.is_dummy else "auto",
            "dtype": self._dtype,
            "max_model_len": limits.max_model_len,
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "enable_prefix_caching": limits.enable_prefix_caching,
            "block_size": self._block_tokens,
            "kv_cache_dtype": kind.stored,
            "kv_cache_memory_bytes": own.vllm_pool_bytes or blocks * memory.block_bytes,
            # the pool is given: what else there is decides itself whether it fits
            "gpu_memory_utilization": 0.05,
            "tensor_parallel_size": own.vllm_tensor_parallel_size,
            "enforce_eager": self._is_eager,
            # its own times
            "disable_log_stats": False,
            "seed": 0,
        }
        if kind.gives_rows:
            # log-probabilities of the whole vocabulary; and no capture of a step that nobody times
            given |= {"max_logprobs": -1, "enforce_eager": True}
        elif own.vllm_max_capture_size is not None:
            given["max_cudagraph_capture_size"] = own.vllm_max_capture_size
        if own.vllm_attention_backend is not None:
            given["attention_backend"] = own.vllm_attention_backend
        return given

    def _environment(self) -> dict[str, str]:
        # how long a sequence may be is judged by the suites, who say so in the record
        found = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
        kind, _, index = self._device_name.partition(":")
        if kind == "cpu":
            # threads would be bound to cores that others use
            found["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            if self._settings.threads is not None:
                found["OMP_NUM_THREADS"] = str(self._settings.threads)
            return found
        first = int(index or 0)
        wanted = range(first, first + self._own.vllm_tensor_parallel_size)
        visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        if visible and wanted.stop > len(visible):
            raise CaseInvalid(
                f"--kv-vllm-tensor-parallel-size={len(wanted)}: from {self._device_name} on there are "
                f"{max(len(visible) - first, 0)} cards; give less"
            )
        return found | {"CUDA_VISIBLE_DEVICES": ",".join(visible[i] if visible else str(i) for i in wanted)}

    def _refuse_unknown(self, hello: Mapping[str, Any]) -> None:
        stored, backend = stored_format(self._case), self._own.vllm_attention_backend
        if stored not in hello["formats"]:
            raise CaseInvalid(
                f"--kv-cache-dtype={stored}: vLLM {hello['vllm']} has no such format; use auto, or one of its own: "
                f"{', '.join(hello['formats'])}"
            )
        if backend is not None and backend not in hello["backends"]:
            raise CaseInvalid(
                f"--kv-vllm-attention-backend={backend}: vLLM {hello['vllm']} has no such backend; use one of "
                f"{', '.join(hello['backends'])}"
            )

    @property
    def _serving(self) -> EngineKind:
        """The engine that serves the case."""
        return EngineKind(VllmLimits.of(self._case), stored_format(self._case))

    def _state(self, kind: EngineKind) -> None:
        """Say what vLLM really set, and refuse a case that is not what its name says.

        Raises
        ------
        CaseInvalid
            If keys and values are stored in another format, or another backend attends.
        """
        facts, cards = self._facts, self._facts["cards"]
        formats, backends = ({name for card in cards for name in card[kind]} for kind in ("kv_formats", "backends"))
        if kind.gives_rows:
            self.effective["scored"] = "every token a step of its own, eager"
        # of an engine that scores alone nothing else is the case's
        if kind == self._serving:
            self.effective |= {name: facts[name] for name in facts if name not in ("cards", "eager", "captured")} | {
                "decode_step": "eager" if facts["eager"] or facts["captured"] == "NONE" else "cuda_graph",
                "cudagraph_mode": facts["captured"],
                "attention": ",".join(sorted(backends)),
                "kv_tensors": sorted({name for card in cards for name in card["kv_tensors"]}),
                "vllm": self._install.vllm,
            }
        asked = kind.stored
        if formats - {asked} and asked != AUTO:
            raise CaseInvalid(f"--kv-cache-dtype={asked}: vLLM stored {', '.join(sorted(formats))} instead")
        largest = self._own.vllm_max_capture_size
        if largest is not None and kind == self._serving and facts["max_num_seqs"] not in facts["capture_sizes"]:
            # padded to a captured size beyond its own batch vLLM replays a step in pieces, and beyond the largest not at all
            raise CaseInvalid(
                f"--kv-vllm-max-capture-size={largest}: vLLM captured {facts['capture_sizes'][-1]} sequences at most and no "
                f"step of {facts['max_num_seqs']}; leave it out, or give a batch of 1, 2, 4 or a multiple of 8 (from 256 on "
                "of 16) and a size that is no smaller"
            )
        backend = self._own.vllm_attention_backend
        if backend is not None and backends != {backend}:
            raise CaseInvalid(
                f"--kv-vllm-attention-backend={backend}: vLLM took {', '.join(sorted(backends))} instead; use auto, or one "
                "that it has for this device and model"
            )

    def _require_batch(self, requests: Sequence[ServeRequest]) -> None:
        most = VllmLimits.of(self._case).max_num_seqs
        if len(requests) > most:
            raise CaseInvalid(f"{len(requests)} requests for an engine of {most} sequences; raise the batch")

    def _memory_model(self, stored: str | None = None) -> VllmMemory:
        size = element_bytes(stored or stored_format(self._case), ELEMENT_BYTES[self._dtype])
        return VllmMemory(
            self._architecture, self._dtype, size, self._block_tokens, self._own.vllm_tensor_parallel_size,
            self._own.vllm_pool_bytes,
        )  # fmt: skip

    @property
    def _block_tokens(self) -> int:
        return self._own.vllm_block_size or BLOCK_TOKENS[self._case.device_kind]

    @property
    def _token_bytes(self) -> int:
        """Bytes of a token's keys and values on all cards together."""
        memory = self._memory_model()
        return memory.block_bytes * memory.cards // memory.block_tokens

    def _model_facts(self) -> dict[str, Any]:
        weights, chosen = self._architecture.weights, nano_format(NONE, self._dtype)
        return {
            "label": self._spec.label,
            "kind": self._spec.kind,
            "revision": self._spec.revision,
            "notes": list(self._spec.notes),
            "parameters": None if isinstance(weights, str) else weights.elements,
            "weights_bytes": None if isinstance(weights, str) else weights.bytes(chosen),
            "step_weight_bytes": None if isinstance(weights, str) else weights.step_bytes(chosen),
            "trained_length": self._architecture.trained_length,
            "tokenizer_hash": None if self._tokenizer is None else tokenizer_hash(self._tokenizer),
            "load_s": None,
            "is_dummy": self._spec.is_dummy,
        }


def _sent(requests: Sequence[ServeRequest]) -> list[dict[str, Any]]:
    return [{"prompt": list(map(int, one.prompt)), "new_tokens": one.new_tokens} for one in requests]
