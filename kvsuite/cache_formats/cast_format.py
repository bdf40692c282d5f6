"""Keys and values cast to a smaller type without scales, as one engine alone stores them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

#: bytes of an element by the name, and the engine that has it
CAST_TYPES: dict[str, tuple[int, str]] = {"fp8_e5m2": (1, "vllm")}


@dataclass(frozen=True)
class CastFormat:
    """A type for keys and values alike.

    Parameters
    ----------
    name
        In `CAST_TYPES`.
    """

    name: str

    @property
    def label(self) -> str:
        """What stands in names of cases and in tables."""
        return self.name

    @property
    def engine(self) -> str:
        """Which engine has it."""
        return CAST_TYPES[self.name][1]

    def of_layers(self, layers: int) -> tuple[CastFormat, ...]:
        """The format of each of ``layers`` layers, the same for all."""
        return (self,) * layers

    def layer_bytes(
        self, stored: int, seen: int, *, kv_heads: int, key_dim: int, value_dim: int, element_bytes: int
    ) -> int:
        """As `kvsuite.cache_formats.cache_format.CacheFormat.layer_bytes`: every token is stored on its own."""
        return stored * kv_heads * (key_dim + value_dim) * CAST_TYPES[self.name][0]

    def refused(self, key_dim: int, value_dim: int) -> str | None:
        """Why vectors of such sizes cannot be stored so: all can."""
        return None

    def __str__(self) -> str:
        return self.name
