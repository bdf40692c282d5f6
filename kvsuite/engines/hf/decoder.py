"""A transformers decoder as kvsuite sees it: forward passes over a cache, sizes, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvsuite.compression.base import Policy

from .attention import showing
from .cache import EvictionCache, Implementation
from .cache_plan import kv_bytes
from .rotary import Rotary


class Decoder:
    """Wraps a loaded causal language model.

    Parameters
    ----------
    model
        The transformers model, in evaluation mode.
    text_config
        Configuration of its language part.
    device
        Where it lies.
    """

    def __init__(self, model: Any, text_config: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.layers = int(text_config.num_hidden_layers)
        heads = int(text_config.num_attention_heads)
        self.kv_heads = int(getattr(text_config, "num_key_value_heads", None) or heads)
        self.head_dim = int(getattr(text_config, "head_dim", None) or text_config.hidden_size // heads)
        self.element_bytes = model.dtype.itemsize
        kinds = getattr(text_config, "layer_types", None) or []
        window = getattr(text_config, "sliding_window", None)
        slides = any("sliding" in kind for kind in kinds) if kinds else bool(window)
        #: the model's own sliding window, ``None`` if its layers see everything
        self.sliding_window = int(window) if window and slides else None

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

    def kv_bytes(self, tokens_per_layer: Sequence[int]) -> int:
        """Bytes of a cache that holds these numbers of tokens."""
        return kv_bytes(
            tokens_per_layer,
            batch=1,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            element_bytes=self.element_bytes,
        )

    def set_attention(self, implementation: str) -> None:
        """Choose transformers' attention function (``sdpa``, ``eager``)."""
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def probe_step(self) -> None:
        """A short prefill and a few decode steps: what the thread probe times."""
        with torch.inference_mode():
            cache = self.new_cache(None, (0, 36), "ring", None)
            self.forward(torch.zeros(1, 32, dtype=torch.int64, device=self.device), cache)
            for _ in range(3):
                self.forward(torch.zeros(1, 1, dtype=torch.int64, device=self.device), cache)
