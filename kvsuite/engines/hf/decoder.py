"""A transformers decoder with caches of this engine: forward passes over one, and making them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvsuite.compression.base import Policy
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.rotary import Rotary

from .attention import showing
from .cache import EvictionCache, Implementation


class CachedDecoder(Decoder):
    """A decoder that is fed behind what a cache of this engine holds."""

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        """Feed ``ids`` ``[batch, tokens]`` behind what ``cache`` holds; logits of the last position ``[batch, 1, vocab]``.

        Positions are always given: a model left to itself takes the cache's length for the position.
        """
        positions = cache.begin(ids.shape[1])
        with showing(cache if cache.views_prompt else None):
            logits: Tensor = self.model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
        cache.commit()
        return logits

    def all_logits(self, ids: Tensor) -> Tensor:
        """Logits of every position ``[batch, tokens, vocab]`` in the model's dtype, by one forward without a cache."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def new_cache(
        self, policy: Policy | None, capacity: tuple[int, int], implementation: Implementation, rotary: Rotary | None
    ) -> EvictionCache:
        """Build an empty cache for batch 1."""
        return EvictionCache(
            layers=self.layers,
            policy=policy,
            batch=1,
            kv_heads=self.kv_heads,
            device=self.device,
            capacity=capacity,
            implementation=implementation,
            rotary=rotary,
        )

    def set_attention(self, implementation: str) -> None:
        """Choose transformers' attention function (``sdpa``, ``eager``)."""
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
