"""A transformers decoder with caches of this engine: forward passes over one, and making them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.compression.base import Policy
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.rotary import Rotary, forget_longer_sequences
from kvsuite.errors import CaseInvalid
from kvsuite.models.images import image_places, image_shape, image_spans

from .attention import showing
from .cache import EvictionCache, Implementation
from .own_layers import WindowLayer
from .packed_form import PackedForm


class CachedDecoder(Decoder):
    """A decoder that is fed behind what a cache of this engine holds."""

    def __init__(self, model: Any, text_config: Any, device: torch.device) -> None:
        super().__init__(model, text_config, device)
        self._text_config = text_config
        taken = inspect.signature(model.forward).parameters
        #: whether a forward pass may be told the positions of its tokens
        self.takes_positions = "position_ids" in taken
        self._last_logits: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        if self.of_layers.switch_length is not None:
            forget_longer_sequences(model)

    def forward(self, ids: Tensor, cache: Any, pixels: Tensor | None = None) -> Tensor:
        """Feed ``ids`` ``[batch, tokens]`` behind what ``cache`` holds; logits of the last position ``[batch, 1, vocab]``.

        ``pixels`` ``[n, 3, height, width]`` are images whose features stand where ``ids`` has the model's image tokens.
        Positions are always given: a model left to itself takes the cache's length for the position.
        """
        if pixels is not None and isinstance(cache, EvictionCache):
            shape = image_shape(self.model.config.to_dict())
            cache.set_images(image_spans(shape, image_places(shape, ids[0].tolist())))
        positions = cache.begin(ids.shape[1])
        placed = {"position_ids": positions} if self.takes_positions else {}
        if ids.shape[1] == 1 and self._is_masked_at_once and cache.is_uneven:
            # eager attention has one mask for all layers, as long as the first one's cache; a token sees all that is stored
            placed["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=self.device)
        if pixels is not None:
            placed["pixel_values"] = pixels
        with showing(cache if cache.is_shown else None):
            logits: Tensor = self.model(
                input_ids=ids, past_key_values=cache, use_cache=True, **placed, **self._last_logits
            ).logits
        cache.commit()
        return logits[:, -1:]

    def all_logits(self, ids: Tensor) -> Tensor:
        """Logits of every position ``[batch, tokens, vocab]`` in the model's dtype, by one forward without a cache."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def bounded_layers(self, tokens: int) -> tuple[int, ...]:
        """Layers that see less than all of ``tokens``, or carry a state too: transformers' own cache layers serve these."""
        return tuple(
            layer.index
            for layer in self.of_layers.layers
            if layer.attention is None or layer.recurrent or (layer.window is not None and layer.window <= tokens)
        )

    def new_cache(
        self,
        policy: Policy | None,
        capacity: tuple[int, int],
        implementation: Implementation,
        rotary: Rotary | None,
        tokens: int = 0,
        chosen: OwnFormat | None = None,
        batch: int = 1,
    ) -> EvictionCache:
        """Build an empty cache of format ``chosen`` for sequences of no more than ``tokens``.

        Raises
        ------
        CaseInvalid
            If layers that transformers' own cache serves would not be packed.
        """
        bounded = self.bounded_layers(tokens)
        if bounded and chosen is not None:
            raise CaseInvalid(
                f"--kv-cache-dtype={chosen.label}: {tokens} tokens outgrow the windows of layers "
                f"{', '.join(map(str, bounded))}, stored in the model's own numbers; give shorter texts"
            )
        return EvictionCache(
            layers=self.layers,
            policy=policy,
            batch=batch,
            kv_heads=self.kv_heads,
            device=self.device,
            capacity=capacity,
            implementation=implementation,
            rotary=rotary,
            unrotated=[layer.index for layer in self.of_layers.layers if not layer.rotary],
            own=partial(self._transformers_layers, bounded) if bounded else dict,
            forms=() if chosen is None else self._forms(chosen),
        )

    def _forms(self, chosen: OwnFormat) -> list[PackedForm | None]:
        """How each layer packs, one object for each format."""
        by_layer = chosen.of_layers(self.layers)
        made = {one: PackedForm(one, self.model.dtype) for one in by_layer if one is not None}
        return [None if one is None else made[one] for one in by_layer]

    def _transformers_layers(self, indices: tuple[int, ...]) -> Mapping[int, Any]:
        """The layers that transformers would make for these, whose windows keep no more alive than they hold."""
        made = DynamicCache(config=self._text_config).layers
        return {
            i: WindowLayer(made[i].sliding_window) if type(made[i]) is DynamicSlidingWindowLayer else made[i]
            for i in indices
        }

    @property
    def _is_masked_at_once(self) -> bool:
        """Whether one mask may serve all layers, of which none needs another than a plain one."""
        return self.is_eager and all(
            layer.attention in ("full", "sliding") and not layer.recurrent for layer in self.of_layers.layers
        )

    @property
    def is_eager(self) -> bool:
        """Whether attention is computed by the model's own eager function."""
        return str(self.model.config._attn_implementation).startswith("eager")

    def set_attention(self, implementation: str) -> None:
        """Choose transformers' attention function (``sdpa``, ``eager``)."""
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
