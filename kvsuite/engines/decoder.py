"""A transformers decoder as every engine sees it that holds one: sizes, bytes, a short run for a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvsuite.models.layers import layers_of


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

    Raises
    ------
    UserError
        If what its layers store cannot be told (`kvsuite.models.layers.UnknownLayers`).
    """

    def __init__(self, model: Any, text_config: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        #: what each layer is and stores
        self.model_layers = layers_of(text_config.to_dict())
        self.layers = len(self.model_layers.layers)
        self.kv_heads = max(layer.kv_heads for layer in self.model_layers.layers)
        self.element_bytes = model.dtype.itemsize
        #: the model's own window, ``None`` if its layers see everything
        self.sliding_window = max((layer.window or 0 for layer in self.model_layers.windows), default=None)

    def kv_bytes(self, tokens_per_layer: Sequence[int]) -> int:
        """Bytes of a cache that holds these numbers of tokens."""
        return self.model_layers.kv_bytes(tokens_per_layer, self.element_bytes)

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
