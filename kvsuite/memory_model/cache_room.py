"""What a token's keys and values take in each cache format, and how many tokens a card holds in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.cache_formats import by_layer
from kvsuite.cache_formats.by_layer import CountedFormat
from kvsuite.cache_formats.cache_format import AUTO
from kvsuite.errors import CaseInvalid

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


def kv_bytes(architecture: Architecture, tokens: int, element_bytes: int, chosen: CountedFormat | None) -> int:
    """Bytes of the keys and values of a text, packed or not.

    Raises
    ------
    UserError
        If what the layers store is not known.
    """
    if chosen is None or isinstance(architecture.cache, str):
        return architecture.kv_bytes(tokens, element_bytes)
    return by_layer.kv_bytes(chosen, architecture.cache, [tokens] * architecture.layers, tokens, element_bytes)


def cache_rooms(
    architecture: Architecture, element_bytes: int, formats: Sequence[CountedFormat | None], free_bytes: float | None
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
    """
    found = []
    for chosen in formats:
        name = AUTO if chosen is None else chosen.label
        if reason := _refused(architecture, chosen):
            found.append(CacheRoom(name, reason=reason))
            continue
        text = kv_bytes(architecture, TEXT_TOKENS, element_bytes, chosen) / TEXT_TOKENS
        fitting = None if free_bytes is None else _longest(architecture, element_bytes, chosen, free_bytes)
        found.append(CacheRoom(name, text, fitting))
    return found


def _refused(architecture: Architecture, chosen: CountedFormat | None) -> str | None:
    if isinstance(architecture.cache, str):
        return architecture.cache
    if chosen is None:
        return None
    try:
        formats = chosen.of_layers(architecture.layers)
    except CaseInvalid as error:
        return str(error)
    for layer, one in zip(architecture.cache.layers, formats, strict=True):
        if layer.latent or layer.attention != "full" or layer.recurrent:
            return f"layer {layer.index} ({layer.what}) is not packed"
        if reason := one.refused(layer.key_dim, layer.value_dim) if one is not None else None:
            return reason
    return None


def _longest(
    architecture: Architecture, element_bytes: int, chosen: CountedFormat | None, free_bytes: float
) -> int | None:
    """The longest text whose cache fits; ``None`` where every one does (windows alone)."""
    if kv_bytes(architecture, _MOST_TOKENS, element_bytes, chosen) <= free_bytes:
        return None
    low, high = 0, _MOST_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        if kv_bytes(architecture, middle, element_bytes, chosen) <= free_bytes:
            low = middle
        else:
            high = middle
    return low
