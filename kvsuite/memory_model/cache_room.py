"""What a token's keys and values take in each cache format, and how many tokens a card holds in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvsuite.cache_formats import by_layer
from kvsuite.cache_formats.by_layer import CountedFormat
from kvsuite.cache_formats.cache_format import AUTO
from kvsuite.errors import CaseInvalid
from kvsuite.models.layers import Layer

from .config import Architecture

#: tokens of the text whose mean bytes a token are told: residual windows count there
TEXT_TOKENS = 4096
_MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class CacheRoom:
    """A cache format on a model.

    Parameters
    ----------
    name
        Of the format.
    token_bytes
        Of keys and values in all layers, mean over a text of `TEXT_TOKENS`; ``None`` where the format cannot be had.
    tokens
        The longest text whose cache fits; ``None`` without a card, or where the format cannot be had.
    reason
        Why it cannot.
    """

    name: str
    token_bytes: float | None = None
    tokens: int | None = None
    reason: str | None = None


@runtime_checkable
class StoresWindows(Protocol):
    """A predictor for an engine that packs layers with a sliding window like others. transformers' cache does not."""

    def window_tokens(self, window: int, tokens: int) -> int:
        """Tokens that such a layer holds at the end of a text."""

    def most_window_tokens(self, window: int, tokens: int) -> int:
        """The most that it holds on the way there."""


def kv_bytes(
    architecture: Architecture,
    tokens: int,
    element_bytes: int,
    chosen: CountedFormat | None,
    windows: StoresWindows | None = None,
    *,
    on_the_way: bool = False,
) -> int:
    """Bytes of the keys and values of a text, packed or not.

    Parameters
    ----------
    architecture
        The model.
    tokens
        Of the text.
    element_bytes
        Of the model's own dtype.
    chosen
        Its format, ``None`` for the model's dtype.
    windows
        What an engine holds of layers with a sliding window; without it what transformers' cache does.
    on_the_way
        The most there is before the text ends, not what there is at its end.

    Raises
    ------
    UserError
        If what the layers store is not known.
    """
    if isinstance(architecture.cache, str):
        return architecture.kv_bytes(tokens, element_bytes)

    def held(layer: Layer) -> int:
        if windows is None or layer.attention != "sliding" or layer.window is None:
            return layer.stored(tokens)
        return (windows.most_window_tokens if on_the_way else windows.window_tokens)(layer.window, tokens)

    each = [held(layer) for layer in architecture.cache.layers]
    return by_layer.kv_bytes(chosen, architecture.cache, each, tokens, element_bytes)


def cache_rooms(
    architecture: Architecture,
    element_bytes: int,
    formats: Sequence[CountedFormat | None],
    free_bytes: float | None,
    windows: StoresWindows | None = None,
) -> list[CacheRoom]:
    """What each format takes, and how long a text may be.

    Parameters
    ----------
    architecture
        The model.
    element_bytes
        Of the model's own dtype.
    formats
        Cache formats; ``None`` is the model's dtype.
    free_bytes
        What weights leave of a card, ``None`` without one.
    windows
        As for `kv_bytes`.
    """
    found = []
    for chosen in formats:
        name = AUTO if chosen is None else chosen.label
        if reason := _refused(architecture, chosen, windows):
            found.append(CacheRoom(name, reason=reason))
            continue
        text = kv_bytes(architecture, TEXT_TOKENS, element_bytes, chosen, windows) / TEXT_TOKENS
        fitting = None if free_bytes is None else _longest(architecture, element_bytes, chosen, windows, free_bytes)
        found.append(CacheRoom(name, text, fitting))
    return found


def _refused(architecture: Architecture, chosen: CountedFormat | None, windows: StoresWindows | None) -> str | None:
    if isinstance(architecture.cache, str):
        return architecture.cache
    if chosen is None:
        return None
    try:
        formats = chosen.of_layers(architecture.layers)
    except CaseInvalid as error:
        return str(error)
    for layer, one in zip(architecture.cache.layers, formats, strict=True):
        packed = layer.attention == "full" or (layer.attention == "sliding" and windows is not None)
        if layer.latent or not packed or layer.recurrent:
            return f"layer {layer.index} ({layer.what}) is not packed"
        if reason := one.refused(layer.key_dim, layer.value_dim) if one is not None else None:
            return reason
    return None


def _longest(
    architecture: Architecture,
    element_bytes: int,
    chosen: CountedFormat | None,
    windows: StoresWindows | None,
    free_bytes: float,
) -> int | None:
    """The longest text whose cache fits; ``None`` where every one does (windows alone)."""

    def fits(tokens: int) -> bool:
        return kv_bytes(architecture, tokens, element_bytes, chosen, windows, on_the_way=True) <= free_bytes

    if fits(_MOST_TOKENS):
        return None
    low, high = 0, _MOST_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
