"""A session of the `hf` engine: any transformers decoder on torch, with cache policies and presses. Reference semantics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.chosen_format import HqqFormat, StoredFormat, format_of
from kvsuite.case import Case
from kvsuite.engines.cache_compression import CacheCompression, compression_of
from kvsuite.engines.capabilities import refuse_load
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.engine import EngineSettings, Session
from kvsuite.engines.loaded_session import LoadedSession
from kvsuite.engines.questions import Answer, Asked
from kvsuite.engines.results import (
    MemoryPass,
    Served,
    ServeRequest,
    TakeRow,
    TokenProgress,
    WholeScores,
    WindowProgress,
    WindowScores,
)
from kvsuite.engines.window_scoring import compare_windows, score_windows
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.meters.clock import Clock
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.meters.environment import installed_versions
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.models.images import image_problem
from kvsuite.workloads.windows import Window

from .answering import answer_questions
from .applicable import (
    check_layers,
    prepare_merging,
    refuse_attention,
    refuse_foreign,
    refuse_format,
    refuse_policy,
    refuse_press,
    span_of,
    treated_layers,
)
from .attention import register_grouped_attention, register_observed_attention
from .cache import EvictionCache, Implementation
from .decoder import CachedDecoder
from .generation import AnyCache, Generation
from .memory import measure_memory
from .scoring import score_reference, score_tokens, score_whole, states_through


class HfSession(LoadedSession):
    """A loaded transformers model.

    Parameters
    ----------
    case
        Names model, device and dtype.
    settings
        With ``decode_step=auto`` steps are captured on CUDA where the method allows.
    """

    decoder: CachedDecoder
    decoder_class: ClassVar[type[Decoder]] = CachedDecoder

    def __init__(self, case: Case, settings: EngineSettings) -> None:
        sdpa = register_grouped_attention() if case.device_kind == "cuda" else "sdpa"
        super().__init__(case, settings, attention=settings.attention, sdpa=sdpa)
        attention = self._loaded.attention
        refuse_attention(self._loaded.model, attention)
        self._facts["attention"] = attention
        self._decode_step = settings.decode_step
        self._implementation = cast(Implementation, settings.implementation)
        self._seed = settings.seed
        check_layers(self._loaded.model, self.decoder.of_layers)
        if any(layer.attention == "chunked" for layer in self.decoder.of_layers.layers) and attention != "eager":
            # a single token does not see all that a chunk's layer stores, which the grouped function takes for granted
            attention = self._facts["attention"] = "sdpa"
        self._base_attention = attention
        self._treated: frozenset[int] = frozenset()
        self._passed: list[str] = []
        self._generation = self._new_generation(CacheCompression())

    @property
    def ratio_requested(self) -> float | None:
        return self._generation.method.ratio_requested

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int | None:
        plans = self._generation.plan(prompt_tokens, new_tokens - 1)
        if plans is None:
            return None
        held = self.decoder.full_lengths(prompt_tokens + new_tokens - 1)
        lengths = [plans[0].final if layer in self._treated else full for layer, full in enumerate(held)]
        return requests * self._generation.kv_bytes(lengths, prompt_tokens + new_tokens - 1)

    def planned_unknown(self) -> str:
        if self._generation.foreign:
            return "transformers decides when its cache packs"
        return super().planned_unknown()

    def prepare(self, case: Case) -> None:
        self.finish()
        if case.partition is not None:
            raise CaseInvalid("SM partitions need the serving runtime; engine hf runs on the whole device")
        method = compression_of(case, layers=self.decoder.layers)
        press, policy = method.press, method.policy
        span = span_of(case.workload)
        self.decoder.require_positions(span)
        self._treated = treated_layers(self.decoder, policy, span)
        attention = "eager" if press and press.info.attention == "eager" else self._base_attention
        self.decoder.set_attention(attention)
        if policy:
            refuse_policy(policy, self.decoder, self._treated, span)
            prepare_merging(policy, self._loaded, self.decoder.of_layers, self._treated)
        stored = format_of(case)
        chosen = stored if isinstance(stored, OwnFormat) else None
        if isinstance(stored, HqqFormat):
            refuse_foreign(stored, self.decoder, method, span)
        if chosen:
            refuse_format(chosen, self.decoder, method, span)
        if press:
            refuse_press(press.name, self.decoder, span)
            press.supports_layout(self._loaded.model)
        if (policy and policy.needs.prompt) or (chosen and chosen.is_mixed):
            attention = register_observed_attention(attention)
            self.decoder.set_attention(attention)
        self._generation = self._new_generation(method, span, stored)
        bounded = self.decoder.bounded_layers(span)
        reason = self._eager_reason(method, bounded, stored)
        if reason and self._decode_step == "graph":
            raise CaseInvalid(f"--kv-decode-step=graph: {reason}; use auto or eager")
        self._passed = []
        self.effective = self._facts | {
            "attention": attention,
            "decode_step": "eager" if reason else "cuda_graph",
            "implementation": "press" if press else self._implementation,
            "positions": policy.positions if policy else press.info.positions if press else "original",
            "skip_layers": sorted(policy.skip_layers) if policy else [],
            "frees_memory": method.frees_memory,
        }
        if stored:
            self.effective["kv_cache_dtype"] = str(stored)
        if isinstance(stored, HqqFormat):
            self.effective |= {"implementation": "transformers", **installed_versions("hqq")}
        if bounded:
            self.effective["bounded_layers"] = {index: self.decoder.of_layers.layers[index].what for index in bounded}
            if policy:
                self.effective["policy_layers"] = sorted(self._treated)
        if reason and self.device.type == "cuda":
            self.effective["decode_step_reason"] = reason

    def capture(self, requests: Sequence[ServeRequest]) -> None:
        request = self._only(requests)
        if self.effective["decode_step"] != "cuda_graph":
            return
        try:
            self._generation.capture(request.prompt, request.new_tokens - 1)
        except RuntimeError as error:
            if self._decode_step == "graph":
                raise CaseInvalid(f"--kv-decode-step=graph: the step cannot be captured: {error}") from error
            self.effective |= {"decode_step": "eager", "decode_step_reason": f"not capturable: {error}"}
            self._generation.drop_cache()

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        request = self._only(requests)
        # the last token is chosen and never fed
        self._note_length(len(request.prompt) + request.new_tokens - 1)
        return self._untimed(request) if clock is None else self._timed(request, clock)

    def _timed(self, request: ServeRequest, clock: Clock) -> Served:
        generation, prompt, steps = self._generation, request.prompt, request.new_tokens - 1
        captured = generation.captured(len(prompt), steps)
        # a press is built before the clock starts: it is part of loading, not of the request
        with torch.inference_mode(), generation.pressed():
            ids, pixels = generation.ids(prompt), generation.pixels(request.images)
            cache = generation.persistent_cache(len(prompt), steps)
            clock.start()
            logits = generation.forward_prompt(ids, cache, pixels)
            clock.mark()
            token = logits[:, -1].argmax(-1, keepdim=True)
            cache = generation.settle(cache, steps)
            clock.mark()
            output = [token]
            if captured:
                output.append(captured.run(token, clock))
            else:
                for _ in range(steps):
                    output.append(generation.step(output[-1], cache))
                    clock.mark()
            prefill_end, *times = clock.seconds()
            _refuse_vectors(cache)
        taken = RequestTimes(len(prompt), len(prompt), [(t, 1) for t in times], prefill_end=prefill_end)
        return Served([taken], [_token_list(output)])

    def _untimed(self, request: ServeRequest) -> Served:
        """The same tokens on a cache of its own, which is not kept, and by eager steps."""
        generation, prompt, steps = self._generation, request.prompt, request.new_tokens - 1
        with torch.inference_mode(), generation.pressed():
            cache = generation.new_cache(len(prompt), steps)
            output = [generation.prefill(generation.ids(prompt), cache, generation.pixels(request.images))]
            cache = generation.settle(cache, steps)
            for _ in range(steps):
                output.append(generation.step(output[-1], cache))
            _refuse_vectors(cache)
        return Served([], [_token_list(output)])

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        request = self._only(requests)
        self._note_length(len(request.prompt) + request.new_tokens - 1)
        generation = self._generation
        ids, pixels = generation.ids(request.prompt), generation.pixels(request.images)
        found = measure_memory(generation, ids, request.new_tokens, pixels)
        found.warnings += self._passed
        return found

    def score(
        self, tokens: Sequence[int], protocol: str, prefix: int, progress: TokenProgress | None = None
    ) -> TokenScores:
        self._note_length(len(tokens) - 1)
        return score_tokens(self._generation, tokens, protocol, prefix, progress)

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
        self._note_length(len(tokens) - 1)
        generation = self._new_generation(CacheCompression(), self._generation.span) if full else self._generation
        return score_tokens(generation, tokens, protocol, prefix, progress, take)

    def score_whole(self, tokens: Sequence[int], take: TakeRow, *, full: bool) -> WholeScores:
        self._note_length(len(tokens))
        generation = self._new_generation(CacheCompression(), len(tokens)) if full else self._generation
        return score_whole(generation, tokens, take)

    def planned_whole_bytes(self, tokens: int) -> int:
        return self._generation.kv_bytes(self.decoder.full_lengths(tokens), tokens)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        self.decoder.require_positions(len(tokens))
        return score_reference(self.decoder, tokens, first)

    def answer(
        self, asked: Sequence[Asked], *, full: bool, progress: TokenProgress | None = None
    ) -> list[list[Answer]]:
        self._note_length(max(len(one.context) + one.steps for one in asked))
        generation = self._new_generation(CacheCompression(), self._generation.span) if full else self._generation
        return answer_questions(generation, asked, progress)

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        self._note_length(max((window.end - window.begin for window in windows), default=0))
        return score_windows(
            self._loaded.model, tokens, windows, prefix=prefix, prefix_token=prefix_token, progress=progress,
            states_of=states_through(self._generation),
        )  # fmt: skip

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
        if not isinstance(reference, HfSession):
            raise UserError("--kv-reference: only two models of engine hf can be compared position by position")
        return compare_windows(
            self._loaded.model, reference._loaded.model, tokens, windows, prefix=prefix, prefix_token=prefix_token,
            progress=progress, states_of=states_through(self._generation),
        )  # fmt: skip

    def finish(self) -> None:
        self._generation.drop_cache()
        self._generation = self._new_generation(CacheCompression())

    def close(self) -> None:
        self.finish()
        del self._loaded, self.decoder, self._generation

    def _note_length(self, tokens: int) -> None:
        """Refuse a text for whose end there is no position; say what is computed where frequencies change with the length."""
        self.decoder.require_positions(tokens)
        switch = self.decoder.of_layers.switch_length
        if switch is not None and tokens > switch and not self._passed:
            self._passed = [
                f"the model's rotary frequencies change at {switch} tokens, which {tokens} pass: a forward pass rotates what "
                "it is given by the length reached then, and stored keys stay as they were rotated, as in generate"
            ]
            self.effective["rotary_frequencies"] = self._passed[0]

    def _only(self, requests: Sequence[ServeRequest]) -> ServeRequest:
        refuse_load(requests, "hf", reads_images=True)
        if len(requests) != 1:
            raise CaseInvalid(
                "engine hf serves one request at a time; use batch=1, or --kv-engine=nano where it can run the model"
            )
        [request] = requests
        if reason := image_problem(self.image_shape, request.prompt, request.images):
            raise CaseInvalid(f"request of {len(request.prompt)} tokens: {reason}")
        return request

    def _new_generation(
        self, method: CacheCompression, span: int = 0, chosen: StoredFormat | None = None
    ) -> Generation:
        return Generation(
            self.decoder,
            method,
            implementation=self._implementation,
            tokenizer=self.tokenizer,
            seed=self._seed,
            span=span,
            chosen=chosen,
        )

    def _eager_reason(
        self, method: CacheCompression, bounded: Sequence[int], chosen: StoredFormat | None
    ) -> str | None:
        if self.device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if self._decode_step == "eager":
            return "--kv-decode-step=eager"
        if chosen is not None:
            return "packed keys and values are unpacked by many small kernels, which are not captured yet"
        if self._implementation == "copy":
            return "a copying cache moves at every step"
        if bounded:
            return "layers of the model with a window or a state of their own move at every step"
        if self.decoder.of_layers.switch_length is not None:
            return "rotary frequencies that follow the length are computed anew at every step"
        return method.eager_only


def _refuse_vectors(cache: AnyCache) -> None:
    if isinstance(cache, EvictionCache):
        cache.refuse_vectors()


def _token_list(output: list[Tensor]) -> list[int]:
    """Token ids of ``[1, n]`` pieces, in order."""
    return [int(token) for token in torch.cat(output, dim=1)[0].tolist()]
