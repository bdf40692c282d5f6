"""Groups of layers that store the same tokens and so share their block tables."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.cache_format import CacheFormat


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are treated alike.

    Parameters
    ----------
    layers
        Layer indices in order.
    kv_heads, head_dim
        Shape of a token's key and value in one of these layers.
    window
        Tokens that a query sees at most, its own among them; ``None`` for all.
    sinks
        First tokens of a sequence that stay visible beside the window.
    compressed
        Whether the runtime's policy acts on these layers.
    places
        Whether keys are stored unrotated and turned to their place in the cache by the attention.
    rotary
        Whether what a policy turns in these layers is rotated by the model; elsewhere turning does nothing.
    format
        How keys and values are stored, ``None`` for the model's own dtype.
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: int = 0
    compressed: bool = False
    places: bool = False
    rotary: bool = True
    format: CacheFormat | None = None

    def token_bytes(self, element_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers of the group."""
        one = token_bytes(self.kv_heads, self.head_dim, element_bytes, self.format)
        return len(self.layers) * one


def token_bytes(kv_heads: int, head_dim: int, element_bytes: int, chosen: CacheFormat | None) -> int:
    """Bytes of a token's key and value in one layer, scales included.

    Parameters
    ----------
    kv_heads, head_dim
        Shape of both.
    element_bytes
        Of the model's dtype.
    chosen
        The format, ``None`` for the model's dtype.
    """
    if chosen is None:
        return 2 * kv_heads * head_dim * element_bytes
    shape = {"kv_heads": kv_heads, "key_dim": head_dim, "value_dim": head_dim, "element_bytes": element_bytes}
    return chosen.layer_bytes(1, 1, **shape)


def formats_of(chosen: OwnFormat | None, layers: int) -> tuple[CacheFormat | None, ...]:
    """The format of each of ``layers`` layers, ``None`` for the model's own dtype.

    Raises
    ------
    CaseInvalid
        If formats by layer are for another number of them.
    """
    return (None,) * layers if chosen is None else chosen.of_layers(layers)


def unpaged(chosen: OwnFormat) -> str | None:
    """Why pages cannot hold keys and values in a format, whatever the model; ``None`` if they can."""
    if chosen.token_group > 1:
        return "pages hold each token packed on its own, and groups per channel pack several together"
    if chosen.residual:
        return (
            "pages hold tokens in one form for all sequences that share them, and a residual window shows a query its newest "
            "tokens in another"
        )
    return None
