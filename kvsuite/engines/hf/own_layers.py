"""Layers that transformers keeps itself: windows and states, and what of them is alive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """transformers' layer of a window, which keeps no more alive than the window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        # it keeps a view of what attention sees: a whole prompt
        for name in ("keys", "values"):
            setattr(self, name, getattr(self, name).clone(memory_format=torch.contiguous_format))
        return keys, values


def held_by(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Keys and values of a layer of transformers, ``None`` where it has none."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return None if keys is None or values is None or keys.dim() < 4 else (keys, values)


def state_bytes(layers: Iterable[Any]) -> int:
    """Bytes of the states that recurrent layers carry: they hold no tokens, and do not grow."""
    states = [
        state
        for layer in layers
        for name in ("conv_states", "recurrent_states")
        for state in _tensors(getattr(layer, name, None))
    ]
    return sum({s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in states}.values())


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a state: one, some, or some by index."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
