"""One case's way through a transformers model: prefill, compression, decode steps, captured or not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.chosen_format import HqqFormat, StoredFormat
from kvsuite.engines.cache_compression import CacheCompression
from kvsuite.engines.cache_plan import CachePlan, plan
from kvsuite.engines.rotary import Rotary
from kvsuite.errors import CaseInvalid
from kvsuite.models.images import ImagePixels

from .cache import EvictionCache, Implementation
from .decoder import CachedDecoder
from .graph import CapturedDecode
from .hqq_cache import HqqCache
from .press_cache import PressCache

if TYPE_CHECKING:
    from kvsuite.compression.kvpress.session import KvpressSession

AnyCache = EvictionCache | PressCache | HqqCache


class Generation:
    """What `HfSession.prepare` makes ready for a case; generation, scoring and the memory pass run on it.

    Parameters
    ----------
    decoder
        The loaded model.
    method
        What the case does to the cache.
    implementation
        Slot handling of policies.
    tokenizer
        For presses that write a prompt of their own.
    seed
        For presses that draw random numbers.
    span
        Tokens of the longest text that the case has.
    chosen
        Format of stored keys and values, ``None`` for the model's own numbers.
    """

    def __init__(
        self,
        decoder: CachedDecoder,
        method: CacheCompression,
        *,
        implementation: Implementation,
        tokenizer: Any,
        seed: int,
        span: int = 0,
        chosen: StoredFormat | None = None,
    ) -> None:
        self.decoder = decoder
        self.format = chosen if isinstance(chosen, OwnFormat) else None
        self.foreign = chosen if isinstance(chosen, HqqFormat) else None
        self.span = span
        self.method = method
        self.press: KvpressSession | None = None
        self._implementation: Implementation = implementation
        self._tokenizer = tokenizer
        self._seed = seed
        policy = method.policy
        turns = policy is not None and (policy.positions == "cache" or policy.needs.query_statistics is not None)
        # layers that rotate nothing have nothing to undo
        rotating = turns and decoder.of_layers.positions == "rotary"
        self._rotary = Rotary(decoder.model) if rotating else None
        self._captured: dict[tuple[int, int], CapturedDecode] = {}
        self._cache: tuple[tuple[int, int], EvictionCache] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.decoder.device

    def plan(self, prompt_tokens: int, steps: int) -> tuple[CachePlan, CachePlan] | None:
        """Stored tokens of a compressed and of an uncompressed layer; ``None`` where only others know."""
        if self.method.press or self.foreign:
            return None
        return plan(self.method.policy, prompt_tokens, steps), plan(None, prompt_tokens, steps)

    @contextlib.contextmanager
    def pressed(self) -> Iterator[None]:
        """The case's press on the model, a new one every time; nothing for a policy."""
        if self.method.press is None:
            yield
            return
        with self.method.press.session(self.decoder.model, tokenizer=self._tokenizer, seed=self._seed) as press:
            self.press = press
            try:
                yield
            finally:
                self.press = None

    def pixels(self, images: Sequence[ImagePixels]) -> Tensor | None:
        """Images on the device, float32 ``[n, 3, height, width]``; ``None`` where there are none."""
        if not images:
            return None
        return torch.stack([torch.from_numpy(image.pixels) for image in images]).to(self.device)

    def ids(self, tokens: Sequence[int]) -> Tensor:
        """Token ids on the device, int64 ``[1, n]``."""
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)

    def new_cache(self, prompt_tokens: int, steps: int, batch: int = 1) -> AnyCache:
        """An empty cache with room for a prompt and single-token steps, of so many sequences that go on together."""
        if self.foreign:
            return HqqCache(self.foreign, self.decoder.model.config, self.device)
        plans = self.plan(prompt_tokens, steps)
        if plans is None:
            return PressCache(self.decoder.layers, self.device)
        capacity = (plans[0].capacity, plans[1].capacity)
        tokens = max(self.span, prompt_tokens + steps)
        if self.method.policy and tokens > self.span and self._bounded(tokens) != self._bounded(self.span):
            raise CaseInvalid(
                f"a text of {tokens} tokens outgrows the model's own window of {self.decoder.sliding_window}, which the case "
                f"does not say (--kv-max-tokens, --kv-prompt-tokens): a policy would act on other layers"
            )
        return self.decoder.new_cache(
            self.method.policy, capacity, self._implementation, self._rotary, tokens, self.format, batch
        )

    def fork(self, cache: AnyCache) -> AnyCache:
        """A copy of a cache between two forward passes, which goes on without the other."""
        # what belongs to the model is not copied
        shared = (self.decoder, self.decoder.model, self._rotary)
        return copy.deepcopy(cache, {id(one): one for one in shared})

    def _bounded(self, tokens: int) -> tuple[int, ...]:
        return self.decoder.bounded_layers(tokens)

    def kv_bytes(self, lengths: Sequence[int], seen: int) -> int:
        """Bytes of the case's cache where each layer holds so many tokens of a text of ``seen``."""
        return self.decoder.cache_bytes(lengths, seen, self.format)

    def persistent_cache(self, prompt_tokens: int, steps: int) -> AnyCache:
        """The cache of the timed rounds, emptied: its buffers stay, as a serving pool's do."""
        if self.method.press or self.foreign:
            return self.new_cache(prompt_tokens, steps)
        key = (prompt_tokens, steps)
        if self._cache is None or self._cache[0] != key:
            self.drop_cache()
            cache = self.new_cache(prompt_tokens, steps)
            assert isinstance(cache, EvictionCache)
            self._cache = (key, cache)
        self._cache[1].reset()
        return self._cache[1]

    def drop_cache(self) -> None:
        """Give the persistent cache and everything captured on it back."""
        self._captured.clear()
        self._cache = None

    def forward_prompt(self, ids: Tensor, cache: AnyCache, pixels: Tensor | None = None) -> Tensor:
        """Prefill: logits of the last position ``[1, 1, vocab]``."""
        if self.press is None:
            return self.decoder.forward(ids, cache, pixels)
        with self.press.prefill():
            return self.decoder.forward(ids, cache, pixels)

    def prefill(self, ids: Tensor, cache: AnyCache, pixels: Tensor | None = None) -> Tensor:
        """Prefill and take the first output token ``[1, 1]``."""
        return self.forward_prompt(ids, cache, pixels)[:, -1].argmax(-1, keepdim=True)

    def settle(self, cache: AnyCache, steps: int) -> AnyCache:
        """After a prompt: move what a prefill press left into preallocated slots, so that every method decodes alike."""
        if not isinstance(cache, PressCache) or self.method.eager_only:
            return cache
        assert self.press is not None
        key = (cache.seen, steps)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.decoder.new_cache(None, (0, max(cache.lengths()) + steps), "ring", None))
        target = self._cache[1]
        target.adopt(cache.layers, self.press.first_decode_position(cache, cache.seen))
        return target

    def step(self, token: Tensor, cache: AnyCache) -> Tensor:
        """One decode step: the following token ``[1, 1]``; waits for nothing."""
        return self.decoder.forward(token, cache)[:, -1].argmax(-1, keepdim=True)

    def captured(self, prompt_tokens: int, steps: int) -> CapturedDecode | None:
        """Decode steps captured for this shape, ``None`` if there are none."""
        return self._captured.get((prompt_tokens, steps))

    def capture(self, prompt: Sequence[int], steps: int) -> None:
        """Capture the decode steps that follow a prompt of this length.

        Raises
        ------
        RuntimeError
            If the model or the method does what a graph cannot hold.
        """
        if steps < 1 or self.captured(len(prompt), steps):
            return
        with torch.inference_mode(), self.pressed():
            cache = self.persistent_cache(len(prompt), steps)
            token = self.prefill(self.ids(prompt), cache)
            cache = self.settle(cache, steps)
            assert isinstance(cache, EvictionCache)
            self._captured[len(prompt), steps] = CapturedDecode(self.step, cache, token, steps)
