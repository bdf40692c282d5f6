"""A transformers decoder as every engine sees it that holds one: sizes, bytes, a short run for a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvsuite.cache_formats.by_layer import OwnFormat, kv_bytes
from kvsuite.errors import CaseInvalid
from kvsuite.models.layers import ModelLayers, UnknownLayers, layers_of


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
        try:
            #: what each layer is
            self.of_layers: ModelLayers = layers_of(text_config.to_dict())
        except UnknownLayers as error:
            raise CaseInvalid(f"the model cannot be measured: {error}") from error
        self.layers = len(self.of_layers.layers)
        #: key-value heads of the first layer that attends, 0 where none does
        self.kv_heads = next((layer.kv_heads for layer in self.of_layers.layers if layer.attention), 0)
        self.element_bytes = int(model.dtype.itemsize)

    @property
    def sliding_window(self) -> int | None:
        """The shortest sliding window of a layer whose cache is bounded by it, ``None`` where no layer has one."""
        windows = (layer.window for layer in self.of_layers.windows if layer.what == "sliding_attention")
        return min(filter(None, windows), default=None)

    def kv_bytes(self, tokens_per_layer: Sequence[int]) -> int:
        """Bytes of keys and values where each layer holds so many tokens."""
        return self.of_layers.kv_bytes(tokens_per_layer, self.element_bytes)

    def cache_bytes(self, tokens_per_layer: Sequence[int], seen: int, chosen: OwnFormat | None) -> int:
        """Bytes of keys and values in a cache format, of layers that hold so many tokens of a text of ``seen``."""
        return kv_bytes(chosen, self.of_layers, tokens_per_layer, seen, self.element_bytes)

    def full_lengths(self, tokens: int) -> list[int]:
        """Tokens that each layer holds of ``tokens`` with no policy: a layer with a window no more than that."""
        return [layer.stored(tokens) for layer in self.of_layers.layers]

    def require_positions(self, tokens: int) -> None:
        """Refuse a sequence for whose end the model has no position.

        Raises
        ------
        CaseInvalid
            If it is longer than the model's table of positions.
        """
        length = self.of_layers.learned_length
        if length is not None and tokens > length:
            raise CaseInvalid(
                f"{tokens} tokens are more than the {length} positions that the model has learned; give shorter texts and "
                "prompts (--kv-max-tokens, --kv-prompt-tokens, --kv-max-new-tokens, --kv-max-length)"
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
