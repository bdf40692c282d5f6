"""Which layer's keys and values take which format: lowered one after the other by the divergence a saved byte costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvsuite.cache_formats.by_layer import ByLayerFormat, OwnFormat, kv_bytes
from kvsuite.cache_formats.cache_format import AUTO, CacheFormat, SideFormat
from kvsuite.models.layers import ModelLayers

KEYS, VALUES = "keys", "values"
SIDES = (KEYS, VALUES)
PLAIN = SideFormat(AUTO)
#: a layer's keys or values in a format: side, layer, format
Lowering = tuple[str, int, SideFormat]


@dataclass(frozen=True)
class Assignment:
    """A format for the keys and the values of each layer.

    Parameters
    ----------
    keys, values
        By layer.
    """

    keys: tuple[SideFormat, ...]
    values: tuple[SideFormat, ...]

    @classmethod
    def uniform(cls, layers: int, keys: SideFormat = PLAIN, values: SideFormat = PLAIN) -> Assignment:
        """All layers alike."""
        return cls((keys,) * layers, (values,) * layers)

    def side(self, side: str) -> tuple[SideFormat, ...]:
        """The formats of ``keys`` or of ``values``."""
        return self.keys if side == KEYS else self.values

    def lowered(self, lowering: Lowering) -> Assignment:
        """The same with one layer's keys or values in another format."""
        side, layer, chosen = lowering
        own = self.side(side)
        return replace(self, **{side: (*own[:layer], chosen, *own[layer + 1 :])})

    @property
    def format(self) -> OwnFormat | None:
        """The cache format, that of a layer where all are alike; ``None`` where none packs."""
        layers = tuple(
            CacheFormat(keys, values) if keys.is_packed or values.is_packed else None
            for keys, values in zip(self.keys, self.values, strict=True)
        )
        return layers[0] if len(set(layers)) == 1 else ByLayerFormat(layers)


@dataclass(frozen=True)
class TextBytes:
    """Bytes of a text of ``tokens`` tokens in a model's cache.

    Parameters
    ----------
    of
        Layers of the model.
    tokens
        Of the text.
    element_bytes
        Of the model's dtype.
    """

    of: ModelLayers
    tokens: int
    element_bytes: int

    def __call__(self, assignment: Assignment) -> int:
        """In the formats of an assignment."""
        return sum(self.layer(index, assignment) for index in attending(self.of))

    def layer(self, index: int, assignment: Assignment) -> int:
        """Of one layer alone."""
        held = [self.tokens if layer.index == index else 0 for layer in self.of.layers]
        chosen = Assignment.uniform(1, assignment.keys[index], assignment.values[index]).format
        return kv_bytes(chosen, self.of, held, self.tokens, self.element_bytes)

    @property
    def _plain(self) -> int:
        return self(Assignment.uniform(len(self.of.layers)))

    @property
    def elements(self) -> int:
        """Numbers of all keys and values."""
        return self._plain // self.element_bytes

    def bits(self, size: int) -> float:
        """Bits an element where all take ``size`` bytes."""
        return 8 * size / self.elements

    def budget(self, number: float, unit: str) -> float:
        """Bytes that a budget allows: ``bits`` an element, or a ``share`` in per cent of the model's own numbers."""
        return number * self.elements / 8 if unit == "bits" else number / 100 * self._plain


def attending(of: ModelLayers) -> list[int]:
    """Layers that have keys and values."""
    return [layer.index for layer in of.layers if layer.attention]


def lowerings(of: ModelLayers, formats: Sequence[tuple[SideFormat, SideFormat]]) -> list[Lowering]:
    """Every layer's keys in the first of each pair of formats and its values in the second, each once; ``auto`` is left out."""
    found = [
        (side, layer, chosen)
        for pair in formats
        for side, chosen in zip(SIDES, pair, strict=True)
        if chosen.is_packed
        for layer in attending(of)
    ]
    return list(dict.fromkeys(found))


def mixed(
    base: Assignment, divergences: Mapping[Lowering, float], size: TextBytes, most_bytes: float
) -> Assignment | None:
    """Lower keys and values of layers until the cache takes no more than ``most_bytes``.

    The next one is always that whose divergence alone grows least for a byte that it saves, that of ``base`` taken as none.
    Divergences are added up, which holds as long as they are small; the assignment is measured afterwards.

    Parameters
    ----------
    base
        Formats to begin with.
    divergences
        KL divergence of each lowering alone.
    size
        Bytes of a format.
    most_bytes
        The budget.

    Returns
    -------
    Assignment or None
        ``None`` where even the smallest formats take more.
    """
    found, costs = base, dict.fromkeys(((side, layer) for side, layer, _ in divergences), 0.0)
    now = size(base)
    while now > most_bytes:
        best: tuple[float, int, Lowering] | None = None
        for lowering, divergence in divergences.items():
            layer = lowering[1]
            saved = size.layer(layer, found) - size.layer(layer, found.lowered(lowering))
            if saved <= 0:
                continue
            price = (divergence - costs[lowering[:2]]) / saved
            if best is None or price < best[0]:
                best = price, saved, lowering
        if best is None:
            return None
        _, saved, lowering = best
        found, now = found.lowered(lowering), now - saved
        costs[lowering[:2]] = divergences[lowering]
    return found
