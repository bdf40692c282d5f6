"""The cache a kvpress press works on: plain tensors a press may read and set, with true positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PressLayer(DynamicLayer):  # type: ignore[misc]
    """A growing layer that counts the tokens it has *seen*: a press may shorten ``keys`` and ``values`` at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        return keys, values

    def stored(self) -> int:
        """Tokens stored."""
        return 0 if self.keys is None or self.keys.numel() == 0 else int(self.keys.shape[-2])

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query: int | Tensor, *args: Any) -> tuple[int, int]:
        tokens = query if isinstance(query, int) else query.shape[0]
        return self.stored() + tokens, self.seen - self.stored()


class PressCache(Cache):  # type: ignore[misc]
    """Cache of a press's case, with the same `begin` and `commit` as `kvsuite.engines.hf.cache.EvictionCache`."""

    def __init__(self, layers: int, device: torch.device) -> None:
        super().__init__(layers=[PressLayer() for _ in range(layers)])
        self._device = device

    #: presses hook into the model themselves
    is_shown = False

    @property
    def is_uneven(self) -> bool:
        """Whether layers hold different numbers of tokens."""
        return len(set(self.lengths())) > 1

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return int(self.layers[0].seen)

    def begin(self, tokens: int) -> Tensor:
        """Position ids of ``tokens`` new tokens, int64 ``[1, tokens]``."""
        return torch.arange(self.seen, self.seen + tokens, device=self._device)[None]

    def commit(self) -> None:
        """Nothing is left to do: the press acts inside the forward pass."""

    def lengths(self) -> list[int]:
        """Stored tokens of every layer."""
        return [layer.stored() for layer in self.layers]

    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of the distinct live storages; nothing of them is headroom."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in self.layers
            for t in (layer.keys, layer.values)
            if t is not None
        }
        return sum(storages.values()), 0
