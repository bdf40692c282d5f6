"""Attention functions of engine `hf`: decode steps without copies, and prompts whose queries a policy looks at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

GROUPED = "kvsuite_grouped"


def register_grouped_attention() -> str:
    """Make the attention known to transformers and return its name.

    A prompt goes through transformers' own ``sdpa``. A single token sees all stored ones, so it needs no mask, and torch's
    kernels let a group of query heads share a key head. Several transformers releases repeat the keys in memory instead: on
    an H200 that took 20 us for each of keys and values where the attention takes 11 (8B shapes, 4k tokens; docs/measurements).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def grouped(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if query.shape[2] != 1 or attention_mask is not None:
            output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **kwargs)
            return output, None
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=kwargs.get("scaling"), enable_gqa=key.shape[1] != query.shape[1]
        )
        return mixed.transpose(1, 2), None

    AttentionInterface.register(GROUPED, grouped)
    sdpa_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        # transformers makes a mask for a single token too while a CUDA graph is being captured, of layer 0's length
        tokens = kwargs["q_length"] if "q_length" in kwargs else kwargs["cache_position"].shape[0]
        made: Tensor | None = None if tokens == 1 else sdpa_mask(*args, **kwargs)
        return made

    AttentionMaskInterface.register(GROUPED, mask)
    return GROUPED


class SeesQueries(Protocol):
    """A cache whose policy looks at the queries of a prompt, or whose layers have masks of their own."""

    layers: Any


class _CurrentCache:
    """The cache of the forward pass under way; the attention function has no other way to learn it."""

    cache: SeesQueries | None = None


@contextmanager
def showing(cache: SeesQueries | None) -> Iterator[None]:
    """Let the observed attention show ``cache`` the queries of forward passes inside the block."""
    before, _CurrentCache.cache = _CurrentCache.cache, cache
    try:
        yield
    finally:
        _CurrentCache.cache = before


def register_observed_attention(base: str) -> str:
    """Make attention ``base`` known under a second name, under which it shows the cache every layer's queries first.

    A layer that returned packed and other tokens has a mask for them, which stands in the place of the model's.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"{base}_observed"

    def observed(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        cache = _CurrentCache.cache
        if cache is not None:
            scaling = kwargs.get("scaling")
            see = getattr(cache.layers[module.layer_idx], "see", None)
            if see is not None:  # a layer on which no policy acts does not look
                see(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
                seen = cache.layers[module.layer_idx].take_mask(query.shape[1])
                if seen is not None:
                    least = torch.finfo(query.dtype).min
                    attention_mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
                        ~seen, least
                    )
        # each model's module has an eager function of its own
        own = (
            getattr(sys.modules[type(module).__module__], "eager_attention_forward", None) if base == "eager" else None
        )
        found: tuple[Tensor, Any] = (own or ALL_ATTENTION_FUNCTIONS[base])(
            module, query, key, value, attention_mask, dropout=dropout, **kwargs
        )
        return found

    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, observed)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name
