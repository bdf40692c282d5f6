"""Groups of layers that store the same tokens and so share their block tables."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: int = 0
    compressed: bool = False
    places: bool = False
    rotary: bool = True

    def token_bytes(self, element_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers of the group."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * element_bytes
