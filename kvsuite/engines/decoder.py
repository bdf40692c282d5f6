"""A transformers decoder as every engine sees it that holds one: sizes, bytes, a short run for a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cache_plan import kv_bytes


class Decoder:
    """A loaded causal language model.

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

    def kv_bytes(self, tokens_per_layer: Sequence[int]) -> int:
        """Bytes of a cache that holds these numbers of tokens."""
        return kv_bytes(
            tokens_per_layer,
            batch=1,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            element_bytes=self.element_bytes,
        )

    def probe_step(self) -> None:
        """A short prefill and a few decode steps: what the thread probe times."""
        with torch.inference_mode():
            cache = None
            for tokens in (32, 1, 1, 1):
                ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
                cache = self.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).past_key_values


def refuse_while_capturing(what: str) -> None:
    """Guard of everything that may move: a captured step would go on with the old place."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} must not move while a step is captured: reserve it beforehand")
