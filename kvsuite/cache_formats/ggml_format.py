"""llama.cpp's own types of keys and values, by their names there. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: elements and bytes of a block, by ggml's name of the type: those that llama.cpp stores keys and values in
GGML_TYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_1": (32, 24), "q5_0": (32, 22), "q4_1": (32, 20),
    "q4_0": (32, 18), "iq4_nl": (32, 18), "mxfp4": (32, 17), "nvfp4": (64, 36), "q2_0": (64, 18),
}  # fmt: skip


@dataclass(frozen=True)
class GgmlFormat:
    """How llama.cpp stores keys and values: whole blocks along a head's vector.

    Parameters
    ----------
    keys, values
        Names in `GGML_TYPES`.
    """

    keys: str
    values: str

    @property
    def label(self) -> str:
        """What stands in names of cases and in tables."""
        return str(self)

    def of_layers(self, layers: int) -> tuple[GgmlFormat, ...]:
        """The format of each of ``layers`` layers, the same for all."""
        return (self,) * layers

    def layer_bytes(
        self, stored: int, seen: int, *, kv_heads: int, key_dim: int, value_dim: int, element_bytes: int
    ) -> int:
        """As `kvsuite.cache_formats.cache_format.CacheFormat.layer_bytes`: every token is stored on its own."""
        return stored * kv_heads * (side_bytes(self.keys, key_dim) + side_bytes(self.values, value_dim))

    def refused(self, key_dim: int, value_dim: int) -> str | None:
        """Why vectors of such sizes cannot be stored so, ``None`` if they can."""
        for name, size in ((self.keys, key_dim), (self.values, value_dim)):
            block, _ = GGML_TYPES[name]
            if size % block:
                return f"{name} stores {block} numbers together, and the head size {size} is no multiple of that"
        return None

    def __str__(self) -> str:
        return self.keys if self.keys == self.values else f"{self.keys}:{self.values}"


def side_bytes(name: str, head_size: int) -> int:
    """Bytes of a head's vector in type ``name``."""
    block, size = GGML_TYPES[name]
    return head_size // block * size
