"""Does a point fit a card, and if not, which setting makes it fit?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kvsuite.errors import UserError
from kvsuite.options.card import card_bytes

from .design_point import OFF, DesignPoint
from .prediction import Prediction, Predictor

# below these a setting is not worth proposing
_SMALLEST = {"context_window_size": 256, "prefill_chunk_size": 128, "max_batch_size": 1}
_SMALLEST_WINDOW = 256
# from the one that changes least; the first that is small enough is proposed
_FORMATS = ("q0f16", "q4f16_1", "q3f16_1")
_FLOAT32_FORMATS = ("q4f32_1", *_FORMATS)


@dataclass(frozen=True)
class Card:
    """A device's memory.

    Parameters
    ----------
    bytes
        All of it.
    share
        Part of it that the engine may use, in (0, 1].
    """

    bytes: int
    share: float

    @property
    def usable(self) -> float:
        """Bytes that the engine may use."""
        return self.bytes * self.share


def parse_card(text: str, share: float, *, option: str = "--card") -> Card:
    """Read a size (`kvsuite.options.card`) and the share of it that an engine uses.

    Raises
    ------
    UserError
        If it is no size, or the share is not in (0, 1].
    """
    size = card_bytes(text, option)
    if not 0 < share <= 1:
        raise UserError(f"{option}-share={share:g}: must lie above 0 and be at most 1")
    return Card(size, share)


def fits(prediction: Prediction, card: Card) -> bool | None:
    """Whether a point fits; ``None`` where a term is not known and the known ones fit."""
    if prediction.needed is not None:
        return prediction.needed <= card.usable
    return False if prediction.needed_at_least > card.usable else None


@dataclass(frozen=True)
class Mend:
    """Settings that make a point fit.

    Parameters
    ----------
    changes
        New values by setting.
    needed
        Bytes then.
    """

    changes: dict[str, Any] = field(hash=False)
    needed: float

    def __str__(self) -> str:
        shown = {name: "off" if value == OFF else value for name, value in self.changes.items()}
        return " and ".join(f"{name}={value}" for name, value in shown.items())


@dataclass(frozen=True)
class _ChangedPoint:
    """A point and a predictor that differ from the asked ones in ``changes``."""

    changes: dict[str, Any]
    point: DesignPoint
    predictor: Predictor

    @property
    def needed(self) -> float | None:
        return self.predictor.predict(self.point).needed


def mends(predictor: Predictor, point: DesignPoint, card: Card) -> list[Mend]:
    """Settings that make a point fit. Empty if nothing helps, if the point fits, or if its memory is not known.

    First those of which each alone does, with the largest value that does, by halves (a smaller context takes the chunk along,
    a smaller window the sinks); then several together: the one that saves most is turned a step, again and again, until it
    fits.
    """
    prediction = predictor.predict(point)
    if prediction.needed is None or fits(prediction, card):
        return []
    found: dict[str, Mend] = {}
    start = _ChangedPoint({}, point, predictor)
    for name, step in _all(start):
        needed = step.needed
        if name not in found and needed is not None and needed <= card.usable:
            found[name] = Mend(step.changes, needed)
    together = _together(start, card)
    alone = list(found.values())
    return [*alone, *(mend for mend in together if all(mend.changes != other.changes for other in alone))]


def _together(start: _ChangedPoint, card: Card) -> list[Mend]:
    step, needed = start, start.needed
    while needed is not None and needed > card.usable:
        options = [(size, index, at) for index, at in enumerate(_next(step)) if (size := at.needed) is not None]
        best = min(options, key=lambda option: option[:2], default=None)
        if best is None or best[0] >= needed:
            return []
        needed, _, step = best
    return [] if needed is None else [Mend(step.changes, needed)]


def _all(start: _ChangedPoint) -> Iterator[tuple[str, _ChangedPoint]]:
    """Every smaller value of every setting alone, the largest first."""
    yield from _settings(start)
    yield from _formats(start)
    for name, value, predictor in start.predictor.smaller():
        yield name, replace(start, changes=start.changes | {name: value}, predictor=predictor)


def _next(step: _ChangedPoint) -> Iterator[_ChangedPoint]:
    """The next smaller value of every setting."""
    seen = set()
    for name, smaller in _all(step):
        if name not in seen:
            seen.add(name)
            yield smaller


def _settings(start: _ChangedPoint) -> Iterator[tuple[str, _ChangedPoint]]:
    inert = start.predictor.inert()
    for name, smallest in _SMALLEST.items():
        value = getattr(start.point, name) // 2
        while value >= smallest and name not in inert:
            yield name, _moved(start, {name: value})
            value //= 2
    if "sliding_window_size" in inert:
        return
    point = start.point
    window = (point.sliding_window_size if point.has_window else point.context_window_size) // 2
    while window >= _SMALLEST_WINDOW:
        yield "sliding_window_size", _moved(start, {"sliding_window_size": window})
        window //= 2


def _formats(start: _ChangedPoint) -> Iterator[tuple[str, _ChangedPoint]]:
    for name in _FLOAT32_FORMATS if "f32" in start.point.quantization else _FORMATS:
        if name != start.point.quantization:
            moved = _moved(start, {"quantization": name})
            if (moved.needed or 0) < (start.needed or 0):
                yield "quantization", moved


def _moved(start: _ChangedPoint, changes: dict[str, Any]) -> _ChangedPoint:
    """With other values, and with what the rules then ask of the settings that depend on them."""
    point = replace(start.point, **changes)
    if point.prefill_chunk_size > point.context_window_size:
        changes = changes | {"prefill_chunk_size": point.context_window_size}
    if point.has_window and point.attention_sink_size > point.sliding_window_size // 8:
        changes = changes | {"attention_sink_size": point.sliding_window_size // 8}
    point = replace(start.point, **changes)
    return _ChangedPoint(start.changes | changes, point, start.predictor)
