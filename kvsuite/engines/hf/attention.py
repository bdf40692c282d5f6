"""Decode attention without copies: query heads share their key heads inside the kernel."""

from __future__ import annotations

from typing import Any

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
