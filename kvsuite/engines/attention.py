"""Decode attention without copies: grouped query heads as rows of one query, so that keys are never repeated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUPED = "kvsuite_grouped"


def register_grouped_attention() -> str:
    """Make the attention known to transformers and return its name.

    A prompt goes through transformers' own ``sdpa``. A single token is attended to by all stored ones, so no mask is needed,
    and the query heads of a group can be the rows of one query against their shared key head: several transformers releases
    repeat the keys in memory instead, which at batch 1 costs more time than the attention itself.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def grouped(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] != 1 or attention_mask is not None:
            output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
            return output, None
        batch, heads, _, dim = query.shape
        kv_heads = key.shape[1]
        rows = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        mixed = torch.nn.functional.scaled_dot_product_attention(rows, key, value, scale=kwargs.get("scaling"))
        return mixed.reshape(batch, 1, heads, dim), None

    AttentionInterface.register(GROUPED, grouped)
    AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return GROUPED
