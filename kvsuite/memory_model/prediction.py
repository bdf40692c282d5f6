"""What a memory model says of a point: terms with their formula, how sure each is, and the setting that moves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .config import Architecture
from .design_point import DesignPoint

MIB = 1 << 20
#: the setting beside the axes: the prefill chunk in ``mlc-chat-config.json``, from which MLC sizes its buffers
JSON_CHUNK = "json_prefill_chunk"
KEYS_AND_VALUES = "keys and values"

Part = Literal["parameters", "kv_cache", "temporary"]
PARTS: tuple[Part, ...] = ("parameters", "kv_cache", "temporary")
#: ``exact``: closed form. ``fitted``: from published numbers, inside their range. ``extrapolated``: outside of it.
#: ``rough``: a count that leaves things out. ``unknown``: no number, but a reason.
Basis = Literal["exact", "fitted", "extrapolated", "rough", "unknown"]


@dataclass(frozen=True)
class Term:
    """One summand.

    Parameters
    ----------
    part
        What it is counted to.
    name
        What it is for.
    bytes
        Its bytes; ``None`` where it is not known.
    basis
        Where the number comes from.
    settings
        Settings that change it, the most effective first.
    formula
        In words and letters of docs/memory.md.
    reason
        Why it is not known.
    """

    part: Part
    name: str
    bytes: float | None
    basis: Basis
    settings: tuple[str, ...]
    formula: str
    reason: str | None = None


@dataclass(frozen=True)
class Allocation:
    """What really stores keys and values.

    Parameters
    ----------
    blocks
        Blocks (pages) that sequences can own.
    extra
        Blocks beside them.
    block_bytes
        Bytes of a block in all layers.
    dtype
        Of the stored elements; where a cache format packs them, of what they are read as.
    """

    blocks: int
    extra: int
    block_bytes: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return (self.blocks + self.extra) * self.block_bytes


@dataclass(frozen=True)
class Prediction:
    """Memory of one point.

    Parameters
    ----------
    engine
        Whose memory.
    point
        The point.
    terms
        What the engine's own estimate is made of; of an engine that prints none, all there is.
    allocation
        What is allocated for keys and values, ``None`` where it is not known.
    notes
        What a reader of the numbers must know.
    """

    engine: str
    point: DesignPoint
    terms: tuple[Term, ...]
    allocation: Allocation | None
    notes: tuple[str, ...] = ()

    def part(self, name: Part) -> float | None:
        """Bytes of a part, ``None`` if one of its terms is not known."""
        return _sum(term.bytes for term in self.terms if term.part == name)

    @property
    def total(self) -> float | None:
        """Bytes by the engine's own way of counting, ``None`` if a term is not known."""
        return _sum(term.bytes for term in self.terms)

    @property
    def needed(self) -> float | None:
        """Bytes with keys and values as they are really allocated, ``None`` if a term is not known."""
        return _sum(self._needed())

    @property
    def needed_at_least(self) -> float:
        """The known terms of `needed`."""
        return sum(size for size in self._needed() if size is not None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why terms are not known, each reason once."""
        return tuple(dict.fromkeys(term.reason for term in self.terms if term.reason))

    def _needed(self) -> list[float | None]:
        sizes = [term.bytes for term in self.terms if term.name != KEYS_AND_VALUES]
        return [*sizes, None if self.allocation is None else self.allocation.bytes]


class Predictor(Protocol):
    """Predicts memory of one model on one engine."""

    @property
    def engine(self) -> str:
        """Name of the engine."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The model."""
        ...

    @property
    def share(self) -> float:
        """Part of a card that the engine uses, in (0, 1]."""
        ...

    def described(self) -> str:
        """The engine and its own settings in a line, as the heading of a table."""
        ...

    def own_settings(self) -> dict[str, int | None]:
        """Settings beside the axes by name, ``None`` where one is not known."""
        ...

    def kv_notes(self, point: DesignPoint) -> str:
        """What is to be said of a token's keys and values beside their bytes, the end of a line; empty for nothing."""
        ...

    def predict(self, point: DesignPoint) -> Prediction:
        """Memory of a point."""
        ...

    def capacity(self, point: DesignPoint, usable_bytes: float) -> int | None:
        """Tokens for which a card has room by the engine's own estimate, ``None`` for an engine without one."""
        ...

    def smaller(self) -> Sequence[tuple[str, int | str, Predictor]]:
        """Settings beside the axes that would take less: name, value, and the predictor with it."""
        ...

    def inert(self) -> dict[str, str]:
        """Axes that do not reach the engine with this model, with the reason."""
        ...


class PooledPredictor:
    """What predictors share whose pool is made for the point, and whose settings are all axes."""

    engine: str

    def described(self) -> str:
        return f"engine {self.engine}"

    def own_settings(self) -> dict[str, int | None]:
        return {}

    def kv_notes(self, point: DesignPoint) -> str:
        return ""

    def capacity(self, point: DesignPoint, usable_bytes: float) -> int | None:
        """None: the pool is made for the point."""
        return None

    def inert(self) -> dict[str, str]:
        return {}


def _sum(sizes: Iterable[float | None]) -> float | None:
    found = list(sizes)
    known = [size for size in found if size is not None]
    return sum(known) if len(known) == len(found) else None
