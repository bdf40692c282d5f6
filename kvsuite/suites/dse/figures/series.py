"""Which samples of a design-space figure share a panel, a series and a point, and which points a line may join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsuite.suites.dse.columns import AXES

from .inert import AxisVerdict, verdicts
from .points import QUANTITIES, Condition, QuantityReading, Sample, Spread, written

TAG = "tag"
CHUNK = "prefill_chunk_size"
WORDS = {
    "context_window_size": "context",
    "prefill_chunk_size": "prefill chunk",
    "max_batch_size": "batch",
    "sliding_window_size": "window",
    "attention_sink_size": "sink",
}
#: conditions on samples, by the words that a figure shows
CONDITIONS = {
    "batch 1": lambda sample: sample.value("max_batch_size") == 1,
    "window off": lambda sample: sample.value("sliding_window_size") <= 0,
    "sink 0": lambda sample: sample.value("attention_sink_size") == 0,
    "window on": lambda sample: sample.value("sliding_window_size") > 0,
}


@dataclass(frozen=True)
class FigurePlan:
    """What one figure shows.

    Parameters
    ----------
    name
        File name without its kind.
    quantity
        On the y axis, of `QUANTITIES`.
    x
        An axis.
    hue
        An axis, or `TAG`.
    style, col
        An axis, or ``None``.
    where
        Of `CONDITIONS`; samples that meet all of them are drawn.
    """

    name: str
    quantity: str
    x: str
    hue: str = TAG
    style: str | None = None
    col: str | None = None
    where: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """The axes that the figure itself tells apart."""
        return tuple(axis for axis in (self.x, self.hue, self.style, self.col) if axis in AXES)


@dataclass
class Series:
    """Points of one colour, marker and dash in one panel.

    Parameters
    ----------
    tag, condition
        Of its samples; the condition is ``None`` for sums of bytes, which no condition changes.
    hue
        The tag with what distinguishes its conditions, or the setting of the hue axis.
    style
        Setting of the style axis.
    split
        Settings of live axes that nothing else in the figure tells apart: they are never pooled.
    joined
        Whether a line may join the points.
    points
        Repeats by the setting of the x axis.
    """

    tag: str
    condition: Condition | None
    hue: Any
    style: int | None
    split: tuple[int, ...]
    joined: bool
    points: dict[int, list[QuantityReading]] = field(default_factory=dict)

    def spread(self, x: int) -> Spread:
        """Repeats at one setting of the x axis."""
        return Spread.of(self.points[x])


Cell = tuple[int | None, int | None]  # setting of the row axis, of the column axis


@dataclass
class Layout:
    """A figure sorted out: panels by row and column, the axes that were pooled, and why.

    Parameters
    ----------
    row_axis, col_axis
        What panels differ in. A live prefill chunk gets the rows, or the columns where the plan has none.
    rows, cols, xs, hues, styles, splits
        The settings that occur, in order.
    slots
        The pairs of hue and style that occur, in the order in which they stand side by side.
    split_axes
        Axes of `Series.split`.
    panels
        Series by panel.
    trunks
        By panel, lines through points that differ in inert axes alone: drawn where hue or style is inert and x is live.
    inert
        Reason by axis and tag, of the axes that vary among the samples or are shown.
    answered
        Axes that some tag's numbers answer to.
    pooled
        Axes that vary and are not told apart, all of them inert.
    """

    plan: FigurePlan
    row_axis: str | None
    col_axis: str | None
    rows: list[int | None]
    cols: list[int | None]
    xs: list[int]
    hues: list[Any]
    styles: list[int | None]
    splits: list[tuple[int, ...]]
    slots: list[tuple[Any, int | None]]
    split_axes: tuple[str, ...]
    panels: dict[Cell, list[Series]]
    trunks: dict[Cell, list[Series]]
    inert: dict[str, dict[str, str]]
    answered: frozenset[str]
    pooled: tuple[str, ...]
    samples: list[Sample]

    def is_to_scale(self) -> bool:
        """Whether x is a number line: all series are lines, and x has no "off"."""
        return min(self.xs) > 0 and all(series.joined for panel in self.panels.values() for series in panel)

    def is_inert(self, axis: str | None) -> bool:
        """Whether the axis is inert for some tags and live for none."""
        return axis in self.inert and axis not in self.answered


def arrange(plan: FigurePlan, samples: Sequence[Sample]) -> Layout | None:
    """Sort samples into panels and series; ``None`` if none is left to draw.

    Axes are judged on all samples of a tag, before the plan's conditions leave some out.
    """
    known = [sample for sample in samples if plan.quantity in sample.readings]
    chosen = [sample for sample in known if all(CONDITIONS[words](sample) for words in plan.where)]
    if not chosen:
        return None
    tags = list(dict.fromkeys(sample.tag for sample in chosen))
    judged = {tag: verdicts([sample for sample in known if sample.tag == tag], plan.quantity) for tag in tags}
    varied = [axis for axis in AXES if len({sample.value(axis) for sample in chosen}) > 1]
    inert = {axis: _reasons(judged, axis) for axis in AXES if axis in varied or axis in plan.shown}
    inert = {axis: reasons for axis, reasons in inert.items() if reasons}
    answered = {axis for axis in AXES if any(judged[tag][axis].state == "live" for tag in tags)}
    hidden = [axis for axis in varied if axis not in plan.shown]
    live = [axis for axis in hidden if axis in answered]
    facet = CHUNK if CHUNK in live else None
    row_axis, col_axis = (facet, plan.col) if plan.col else (None, facet)
    layout = Layout(
        plan=plan,
        row_axis=row_axis,
        col_axis=col_axis,
        rows=_settings(chosen, row_axis),
        cols=_settings(chosen, col_axis),
        xs=sorted({sample.value(plan.x) for sample in chosen}),
        hues=[],
        styles=_settings(chosen, plan.style),
        splits=[],
        slots=[],
        split_axes=tuple(axis for axis in live if axis != facet),
        panels={},
        trunks={},
        inert=inert,
        answered=frozenset(answered),
        pooled=tuple(axis for axis in hidden if axis not in live),
        samples=chosen,
    )
    _fill(layout, judged)
    return layout


def _reasons(judged: Mapping[str, Mapping[str, AxisVerdict]], axis: str) -> dict[str, str]:
    return {tag: found[axis].reason for tag, found in judged.items() if found[axis].state == "inert"}


def _settings(samples: Sequence[Sample], axis: str | None) -> list[int | None]:
    return [None] if axis is None else [*sorted({sample.value(axis) for sample in samples})]


def _fill(layout: Layout, judged: Mapping[str, Mapping[str, AxisVerdict]]) -> None:
    plan = layout.plan
    labels = condition_labels(layout.samples, plan.quantity)
    found: dict[tuple[Any, ...], Series] = {}
    for sample in layout.samples:
        verdict = judged[sample.tag]
        condition = sample.condition if QUANTITIES[plan.quantity].timed else None
        hue = labels[sample.tag, condition] if plan.hue == TAG else sample.value(plan.hue)
        style = _at(sample, plan.style)
        split = tuple(sample.value(axis) for axis in layout.split_axes)
        cell = _at(sample, layout.row_axis), _at(sample, layout.col_axis)
        is_live = verdict[plan.x].state == "live"
        # a line along x of one setting of an inert axis would show that axis as if it varied
        muddled = [axis for axis in (plan.hue, plan.style) if axis in AXES and verdict[axis].state == "inert"]
        key = (cell, sample.tag, condition, hue, style, split)
        if key not in found:
            found[key] = Series(sample.tag, condition, hue, style, split, is_live and not muddled)
            layout.panels.setdefault(cell, []).append(found[key])
        found[key].points.setdefault(sample.value(plan.x), []).append(sample.readings[plan.quantity])
        if is_live and muddled:
            bare_hue = None if plan.hue in muddled else hue
            bare_style = None if plan.style in muddled else style
            trunk = ("trunk", cell, sample.tag, condition, bare_hue, bare_style, split)
            if trunk not in found:
                found[trunk] = Series(sample.tag, condition, bare_hue, bare_style, split, True)
                layout.trunks.setdefault(cell, []).append(found[trunk])
            found[trunk].points.setdefault(sample.value(plan.x), []).append(sample.readings[plan.quantity])
    every = [series for panel in layout.panels.values() for series in panel]
    layout.hues = list(dict.fromkeys(labels.values())) if plan.hue == TAG else sorted({each.hue for each in every})
    layout.slots = [
        (hue, style)
        for hue in layout.hues
        for style in layout.styles
        if any((each.hue, each.style) == (hue, style) for each in every)
    ]
    layout.splits = sorted({each.split for each in every})


def _at(sample: Sample, axis: str | None) -> int | None:
    return None if axis is None else sample.value(axis)


def short_tags(tags: Sequence[str]) -> dict[str, str]:
    """Tags without the words that all of them begin and end with: ``q4f16_1``. One tag alone stays as it is."""
    words = [tag.split("-") for tag in tags]
    if len(tags) < 2 or len({len(each) for each in words}) > 1:
        return {tag: tag for tag in tags}
    told = [place for place in range(len(words[0])) if len({each[place] for each in words}) > 1]
    return {tag: "-".join(each[told[0] : told[-1] + 1]) for tag, each in zip(tags, words, strict=True)}


def condition_labels(samples: Sequence[Sample], quantity: str) -> dict[tuple[str, Condition | None], str]:
    """What a tag is called under each of its conditions: with what differs between them."""
    if not QUANTITIES[quantity].timed:
        return {(sample.tag, None): sample.tag for sample in samples}
    conditions: dict[str, list[Condition]] = {}
    for sample in samples:
        found = conditions.setdefault(sample.tag, [])
        if sample.condition not in found:
            found.append(sample.condition)
    labels: dict[tuple[str, Condition | None], str] = {}
    for tag, found in conditions.items():
        for condition in found:
            told = [name for name in Condition._fields if len({getattr(each, name) for each in found}) > 1]
            labels[tag, condition] = "\n  ".join([tag, *(_told(name, getattr(condition, name)) for name in told)])
    return labels


def _told(name: str, value: Any) -> str:
    if name == "cached":
        return {True: "last prompt from prefix cache", False: "prompt computed", None: "prefix cache unknown"}[value]
    return {
        "num_runs": f"{value} run{'s' if value != 1 else ''} a point",
        "max_tokens": f"{value} tokens",
        "machine": str(value),
    }.get(name, str(value))


def shown_setting(axis: str, value: int | None) -> str:
    """``context 4 096``; empty for ``None``."""
    return "" if value is None else f"{WORDS[axis]} {written(axis, value)}"
