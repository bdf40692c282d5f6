"""Which axes of a design space a quantity does not answer to: by the file, by what the original did, by its numbers.

kvsuite's rows carry the engine's own answer. The original's rows say nothing, so they are judged twice:

* An axis is inert if the quantity does not move along it. Of points that differ in that axis alone, the quantity at its
  largest value is compared with that at its smallest. A sum of bytes has moved when any of these differ by more than rounding.
  A time or rate has moved when the median of the ratios is further from 1 than the repeats of a point scatter, than
  the ratios scatter among themselves, and than 2 %.
* An axis is inert if the original program cannot have brought it to the engine, whatever the numbers do: they then show other
  machines or other days (one published file slows down by 15 % along the context in this way). It sent one fixed prompt of 39
  (Llama) or 66 (Mistral) tokens, one request at a time, so that batch, context and chunk never touched a time; its window and
  sink reached no Llama and no Mistral. A file that shows longer prompts or batches is not taken for the original's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from kvsuite.suites.dse.columns import AXES

from .points import QUANTITIES, Condition, Sample, Settings, Spread, spreads

#: what three decimals of a sum of parts can hide, MB
ROUNDING_MB = 0.0015
#: least change of a time that counts as one
LEAST_CHANGE = 0.02
#: between why an axis is inert and what its numbers do
MEASURED = "; the numbers move by "
_NOT_BY_TIME = {
    "context_window_size": "one short prompt fills no context",
    "prefill_chunk_size": "the one short prompt fits any chunk",
    "max_batch_size": "requests went one at a time",
}
_NOT_IN_MODEL = {
    "sliding_window_size": "the window never reached the engine",
    "attention_sink_size": "the sink never reached the engine",
}
_FAMILIES = ("llama", "mistral")


@dataclass(frozen=True)
class AxisVerdict:
    """Whether a quantity answers to an axis.

    Parameters
    ----------
    state
        ``"live"``, ``"inert"``, or ``"fixed"`` where the axis has one value.
    reason
        Of an inert axis.
    """

    state: Literal["live", "inert", "fixed"]
    reason: str = ""


def verdicts(samples: Sequence[Sample], name: str) -> dict[str, AxisVerdict]:
    """Judge every axis for one quantity.

    Parameters
    ----------
    samples
        Of one tag.
    name
        Of `QUANTITIES`.
    """
    used = [sample for sample in samples if name in sample.readings]
    return {axis: _verdict(used, name, axis) for axis in AXES}


def _verdict(samples: Sequence[Sample], name: str, axis: str) -> AxisVerdict:
    if len({sample.value(axis) for sample in samples}) < 2:
        return AxisVerdict("fixed")
    by_settings = spreads(samples, name)
    if all(sample.own for sample in samples):
        return _said(samples, by_settings, axis)
    verdict = (_times if QUANTITIES[name].timed else _bytes)(by_settings, axis)
    cannot = _cannot(samples, name, axis)
    # an estimate that moves is no other machine's
    if cannot and (QUANTITIES[name].timed or verdict.state == "inert"):
        return AxisVerdict("inert", f"{cannot} in the original program{MEASURED}{verdict.reason}")
    if verdict.state == "inert":
        return AxisVerdict("inert", f"no change beyond repeats and rounding{MEASURED}{verdict.reason}")
    return AxisVerdict("live")


def _said(samples: Sequence[Sample], points: Mapping[tuple[Settings, Condition], Spread], axis: str) -> AxisVerdict:
    """The engine's own answer, of the points that differ in the axis alone: a sink is inert without a window only."""
    place = AXES.index(axis)
    compared = {shared for shared, _ in pairs_along(points, axis)}
    asked = [s for s in samples if s.settings[:place] + s.settings[place + 1 :] in compared] or samples
    reasons = [sample.inert.get(axis) for sample in asked]
    return AxisVerdict("inert", reasons[0] or "") if all(reasons) else AxisVerdict("live")


def _cannot(samples: Sequence[Sample], name: str, axis: str) -> str | None:
    if axis in _NOT_IN_MODEL:
        return _NOT_IN_MODEL[axis] if any(family in samples[0].tag.lower() for family in _FAMILIES) else None
    return _NOT_BY_TIME[axis] if QUANTITIES[name].timed and all(sample.alone for sample in samples) else None


def pairs_along(
    points: Mapping[tuple[Settings, Condition], Spread], axis: str
) -> dict[tuple[Settings, Condition], dict[int, Spread]]:
    """Points that differ in one axis alone: by what they share, by the axis' value."""
    place = AXES.index(axis)
    groups: dict[tuple[Settings, Condition], dict[int, Spread]] = {}
    for (settings, condition), spread in points.items():
        shared = settings[:place] + settings[place + 1 :]
        groups.setdefault((shared, condition), {})[settings[place]] = spread
    return {key: group for key, group in groups.items() if len(group) > 1}


def _bytes(points: Mapping[tuple[Settings, Condition], Spread], axis: str) -> AxisVerdict:
    groups = pairs_along(points, axis).values()
    moved = max(
        (max(s.high for s in group.values()) - min(s.low for s in group.values()) for group in groups), default=0
    )
    if moved > ROUNDING_MB:
        return AxisVerdict("live", f"up to {moved:.3f} MB")
    return AxisVerdict("inert", f"{moved:.3f} MB" if moved else "0")


def _times(points: Mapping[tuple[Settings, Condition], Spread], axis: str) -> AxisVerdict:
    ratios = [ratio for group in pairs_along(points, axis).values() if (ratio := _ends(group)) is not None]
    if not ratios:
        return AxisVerdict("live", "an unknown amount, no two points differ in it alone")
    middle = median(ratios)
    scatter = median(abs(ratio - middle) for ratio in ratios)
    repeats = [math.log(s.high / s.low) for s in points.values() if s.count > 1 and s.low > 0]
    noise = max(scatter, median(repeats) if repeats else 0.0, LEAST_CHANGE)
    return AxisVerdict("inert" if abs(middle) <= noise else "live", percent(middle))


def _ends(group: Mapping[int, Spread]) -> float | None:
    first, last = (group[value].middle for value in (min(group), max(group)))
    return math.log(last / first) if first > 0 and last > 0 else None


def percent(change: float) -> str:
    """A change of a logarithm as a percentage with its sign."""
    text = f"{math.expm1(change):+.1%}"
    return "0 %" if float(text[:-1]) == 0 else text.replace("%", " %")
