"""A session of the `llamacpp` engine: one GGUF file, and contexts of it as cases need them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.cache_formats.ggml_format import GgmlFormat
from kvsuite.case import Case
from kvsuite.compression.base import Policy
from kvsuite.engines.cache_compression import CacheCompression, compression_of
from kvsuite.engines.cache_plan import plan
from kvsuite.engines.capabilities import refuse_load
from kvsuite.engines.engine import EngineSettings, Session
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
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.engines.threads import choose_threads
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import Architecture
from kvsuite.meters.clock import Clock
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.meters.memory import resident_set_peak
from kvsuite.meters.quality import TokenScores
from kvsuite.workloads.windows import Window

from .answering import SEQUENCES, answer_questions
from .context import BatchToken, Context, ContextSettings
from .library import library
from .memory_model import FULL, LlamacppMemory, cache_bytes, cells_of
from .model import Model
from .options import LlamacppOptions
from .scoring import WindowSequences, compare_windows, score_steps, score_together, score_windows
from .serving import serve_requests
from .source import gguf_source
from .stream import Stream
from .under_load import sequences_of, serve_under_load

#: types of keys that its context shift was seen to rotate; for bf16 it ends the process
SHIFTED = ("f32", "f16", "q8_0", "nvfp4")
# llama.cpp's own default of n_batch; rows of logits of a scored text are no more than these
_BATCH, _SCORED_BATCH = 2048, 512
_NO_ALLOCATIONS = "llama.cpp counts no allocations; memory.reported has the buffers of its log"


class LlamacppSession(Session):
    """A GGUF file in llama.cpp.

    Parameters
    ----------
    case
        Names the model.
    settings
        Without ``threads`` a probe chooses them.
    own
        The engine's options.
    """

    def __init__(self, case: Case, settings: EngineSettings, own: LlamacppOptions) -> None:
        super().__init__()
        self._own, began = own, time.perf_counter()
        source = gguf_source(case.model, own.gguf_type, seed=settings.seed, cache_dir=settings.cache_dir)
        self._source = source
        self._model = Model(library(), source.path, case.model)
        self._of = self._model.of_layers
        self._contexts: dict[ContextSettings, Context] = {}
        self._threads = settings.threads or 1
        if settings.threads is None:
            self._threads = self._probed()
        self._method = CacheCompression()
        self._format, self._point, self._longest = FULL, False, 0
        self._chunk, self._batch = _BATCH, 1
        self._plan: ServingPlan | None = None
        size = self._model.weights_bytes
        self.model = {
            "label": source.spec.label,
            "kind": source.spec.kind,
            "revision": source.spec.revision,
            "notes": source.notes,
            "parameters": self._model.parameters,
            "weights_bytes": size,
            "step_weight_bytes": size - self._model.lookup_bytes,
            "trained_length": self._model.trained_length,
            "tokenizer_hash": source.tokenizer_hash,
            "load_s": time.perf_counter() - began,
            "is_dummy": source.spec.is_dummy,
        }
        if settings.implementation != "ring":
            self.inert["impl"] = "llama.cpp's cells are the cache; ring and copy are caches of engine hf"
        if settings.attention != "auto":
            self.inert["attention"] = "llama.cpp attends with its own kernels; --kv-flash-attention chooses among them"
        if settings.decode_step != "auto":
            self.inert["decode_step"] = "llama.cpp computes graphs of its own, on a CPU"
        if own.gguf_type != "f16" and source.spec.kind in ("gguf", "smollm2"):
            self.inert["gguf_type"] = "the file's weights are taken as they are; it is for checkpoints"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype_name(self) -> str:
        return "float32"

    @property
    def tokenizer(self) -> Any:
        return self._source.tokenizer

    @property
    def vocab_size(self) -> int:
        return self._model.vocabulary

    @property
    def ratio_requested(self) -> float | None:
        return self._method.ratio_requested

    def prepare(self, case: Case) -> None:
        self.finish()
        if case.partition is not None:
            raise CaseInvalid("engine llamacpp runs on the CPU, which has no SMs; leave the partition out")
        self._method = compression_of(case, layers=len(self._of.layers))
        if self._policy is not None and self._policy.skip_layers:
            raise CaseInvalid("--kv-skip-layers: llama.cpp removes a token from all layers; leave it at none")
        chosen = format_of(case)
        self._format = chosen if isinstance(chosen, GgmlFormat) else FULL
        if self._policy is not None and self._policy.positions == "cache" and self._format.keys not in SHIFTED:
            raise CaseInvalid(
                f"--kv-cache-dtype={self._format}: llama.cpp is not known to rotate keys in {self._format.keys} anew, and ends "
                f"the process for bf16; use --kv-positions=original, or keys in {', '.join(SHIFTED)}"
            )
        for layer in self._of.layers:
            if reason := self._format.refused(layer.key_dim, layer.value_dim):
                raise CaseInvalid(f"--kv-cache-dtype={self._format}: {reason}; use f16, bf16 or f32")
        workload = case.workload
        self._point = workload.get("protocol") == "serving"
        self._batch = int(workload.get("batch", 1))
        self._chunk = max(int(case.params["prefill_chunk"]), self._batch) if self._point else _BATCH
        length, new_tokens = (int(workload.get(name, 1)) for name in ("prompt_tokens", "max_new_tokens"))
        if self._point:
            self._longest = int(case.params["context"])
        self._plan = ServingPlan.of(case)
        context = self._serving(length, new_tokens, self._batch) if self._plan is None else self._loaded(self._plan)
        policy = self._policy
        self.effective = {
            "device": "cpu",
            "dtype": self.dtype_name,
            "weight_format": "none",
            "gguf": self._source.path.name,
            "attention": "llama.cpp",
            "decode_step": "eager",
            "implementation": "cells",
            "positions": policy.positions if policy else "original",
            "skip_layers": [],
            "frees_memory": True,
        } | context.effective
        self.inert.pop("prefix_caching", None)
        if self._plan is not None:
            settings = context.settings
            blocks = settings.sequences * settings.cells // BLOCK_TOKENS
            self.effective |= {"num_blocks": blocks, "block_size": BLOCK_TOKENS}
            if self._plan.prefix_caching:
                self.inert["prefix_caching"] = "sequences share no cells here"

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        refuse_load(requests, "llamacpp")
        return serve_requests(self._for(requests), requests, clock, policy=self._policy)

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
        if self._plan is None:
            raise CaseInvalid("engine llamacpp serves requests by their arrivals in cases that have a plan of a pool")
        return serve_under_load(self._loaded(self._plan), self._plan, requests, concurrency=concurrency)

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        refuse_load(requests, "llamacpp")
        self._close_contexts()
        seen: list[tuple[int, list[int]]] = []

        def look(streams: Sequence[Stream]) -> None:
            seen.append((sum(one.stored_bytes for one in streams), [one.stored for one in streams]))

        with resident_set_peak() as resident:
            context = self._for(requests)
            serve_requests(context, requests, None, policy=self._policy, look=look)
        (prompts, prompt_tokens), (total, tokens) = seen
        layers = len(self._of.layers)
        found = MemoryPass.unmeasured(
            _NO_ALLOCATIONS,
            resident=resident,
            kv_bytes_prefill=prompts,
            kv_bytes_decode=total,
            kv_bytes_allocated=context.settings.cache_bytes(self._of),
            lengths_prefill=[max(prompt_tokens)] * layers,
            lengths_decode=[max(tokens)] * layers,
            reported={f"{name.lower()}_bytes": size for name, size in (self._model.buffers | context.buffers).items()},
        )
        found.unseen = None
        found.warnings += self._method.caveats(min(len(one.prompt) for one in requests))
        return found

    def reach(self, case: Case) -> Reach:
        params, workload = case.params, case.workload
        inert = {}
        prompts = int(params["batch"]) * int(workload["prompt_tokens"])
        if int(params["window"]) > 0:
            inert["window"] = "llama.cpp takes no window beside the model's own"
            if int(params["sink"]):
                inert["sink"] = inert["window"]
        chunk = max(int(params["prefill_chunk"]), int(params["batch"]))
        if chunk >= prompts:
            inert["prefill_chunk"] = f"it never splits a step: all prompts together have {prompts} tokens"
        if workload.get("prefix_caching"):
            inert["prefix_caching"] = "sequences share no cells here"
        settings = {
            "context": int(params["context"]),
            "cells": cells_of(int(params["context"])),
            "step_tokens": min(chunk, prompts),
            "batch": int(params["batch"]),
        }
        return Reach(settings, inert)

    # bytes

    def full_kv_bytes(self, tokens: int) -> int:
        return cache_bytes(FULL, self._of, tokens)

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int | None:
        # the last token is chosen and never fed
        return requests * self._bytes(plan(self._policy, prompt_tokens, new_tokens - 1).final)

    def memory_model(self, architecture: Architecture) -> LlamacppMemory:
        return LlamacppMemory(architecture, self._format, None, self._model.weights_bytes)

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> float:
        lengths = range(prompt_tokens + 1, prompt_tokens + new_tokens)
        return requests * sum(map(self._bytes, lengths)) / len(lengths)

    # scores

    def score(
        self, tokens: Sequence[int], protocol: str, prefix: int, progress: TokenProgress | None = None
    ) -> TokenScores:
        context = self._scoring(len(tokens), self._format)
        return score_steps(context, tokens, protocol, prefix, policy=self._policy, progress=progress)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        return score_together(self._scoring(len(tokens), FULL), tokens, first)

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
        context = self._scoring(len(tokens), FULL if full else self._format)
        policy = None if full else self._policy
        return score_steps(context, tokens, protocol, prefix, policy=policy, take=take, progress=progress)

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        text = self._text(tokens, windows, prefix, prefix_token)
        return score_windows(self._scoring(text.longest, self._format), text, progress)

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
        if reference is not self:
            raise UserError("--kv-reference: engine llamacpp compares caches of one model; give --kv-reference=none")
        text = self._text(tokens, windows, prefix, prefix_token)
        arms = self._scoring(text.longest, self._format), self._scoring(text.longest, FULL)
        return compare_windows(arms, text, progress)

    def answer(
        self, asked: Sequence[Asked], *, full: bool, progress: TokenProgress | None = None
    ) -> list[list[Answer]]:
        longest = max(len(one.context) + one.steps for one in asked)
        context = self._scoring(longest, FULL if full else self._format, SEQUENCES)
        return answer_questions(context, asked, policy=None if full else self._policy, progress=progress)

    def finish(self) -> None:
        self._close_contexts()
        self._method, self._format = CacheCompression(), FULL
        self._point, self._longest, self._chunk, self._batch = False, 0, _BATCH, 1
        self._plan = None

    def close(self) -> None:
        self._close_contexts()
        self._model.close()

    @property
    def _policy(self) -> Policy | None:
        return self._method.policy

    def _bytes(self, tokens: int) -> int:
        return cache_bytes(self._format, self._of, tokens)

    def _text(
        self, tokens: Sequence[int], windows: Sequence[Window], prefix: str, prefix_token: int | None
    ) -> WindowSequences:
        text = WindowSequences(tokens, windows, prefix, prefix_token)
        text.require_rows(self.vocab_size)
        return text

    def _for(self, requests: Sequence[ServeRequest]) -> Context:
        """The context of a design point, or one in which these requests have room."""
        if self._point and len(requests) > self._batch:
            raise CaseInvalid(f"{len(requests)} requests at once, and the point serves batch={self._batch}")
        longest = max(len(one.prompt) for one in requests), max(one.new_tokens for one in requests)
        return self._serving(*longest, self._batch if self._point else len(requests))

    def _serving(self, prompt_tokens: int, new_tokens: int, sequences: int) -> Context:
        # behind the prompt a policy leaves less, and the last token is never fed
        needed = max(prompt_tokens, plan(self._policy, prompt_tokens, new_tokens - 1).capacity)
        self._longest = max(self._longest, needed)
        return self._context(
            ContextSettings(
                tokens=self._longest, sequences=sequences, batch=self._chunk, micro_batch=self._own.ubatch,
                format=self._format, flash_attention=self._own.flash_attention, threads=self._threads,
            )
        )  # fmt: skip

    def _loaded(self, plan: ServingPlan) -> Context:
        """The context of a plan: as many sequences as its pool holds."""
        return self._context(
            ContextSettings(
                tokens=plan.max_model_len, sequences=sequences_of(plan, self._bytes(1)), batch=plan.step_tokens,
                micro_batch=self._own.ubatch, format=self._format, flash_attention=self._own.flash_attention,
                threads=self._threads,
            )
        )  # fmt: skip

    def _scoring(self, tokens: int, chosen: GgmlFormat, sequences: int = 1) -> Context:
        return self._context(
            ContextSettings(
                tokens=tokens, sequences=sequences, batch=_SCORED_BATCH, micro_batch=self._own.ubatch, format=chosen,
                flash_attention=self._own.flash_attention, threads=self._threads,
            )
        )  # fmt: skip

    def _context(self, settings: ContextSettings) -> Context:
        """The context of such settings, made if need be; contexts that differ in size alone are not kept beside each other."""
        settings = replace(settings, tokens=settings.cells)
        if settings not in self._contexts:
            for other in [one for one in self._contexts if replace(one, tokens=settings.tokens) == settings]:
                self._contexts.pop(other).close()
            needed, free = settings.cache_bytes(self._of), psutil.virtual_memory().available
            if needed > free:
                raise CaseInvalid(
                    f"no room: {settings.sequences} sequences of {settings.cells} tokens in {settings.format} need {needed} "
                    f"bytes of keys and values, and {free} are free; give shorter contexts, a smaller batch or another "
                    "--kv-cache-dtype"
                )
            self._contexts[settings] = Context(self._model, self._of, settings)
        return self._contexts[settings]

    def _close_contexts(self) -> None:
        for context in self._contexts.values():
            context.close()
        self._contexts.clear()

    def _probed(self) -> int:
        """Threads that decode fastest."""
        context = self._scoring(32, FULL)

        def step() -> None:
            context.clear()
            for at in range(8):
                context.decode([BatchToken(0, at, wanted=True)])

        found = choose_threads(step, use=context.set_threads)
        self._close_contexts()
        return found
