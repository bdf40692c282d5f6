"""Metric: one number with all that a table, a page, a plot, a CSV or a comparison needs to show and to judge it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

MetricClass = Literal["deterministic", "near_deterministic", "timed", "ambient"]
Better = Literal["lower", "higher", "none"]
Group = Literal["quality", "speed", "memory", "other"]

#: units that tables convert to: of which unit they are, and how many of it
LARGER_UNITS: Mapping[str, tuple[str, float]] = {
    "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20),
    "GiB": ("bytes", 2.0**30),
    "ms": ("s", 1e-3),
    "µs": ("s", 1e-6),
}
#: what a number says without its unit, or its label with it
_SILENT_UNITS = ("1", "tok/s", "tokens", "bit", "nat", "steps", "sequences")
# few digits: a format may come from a file, and must not become a page of them
_FORMAT = re.compile(r"\+?,?(\.\d)?[efg%]")
#: how the line of a finished case writes a unit: unit, factor, spec
_IN_A_LINE = {"s": ("ms", 1e3, ".2f"), "bytes": ("MiB", 2.0**-20, ".2f")}
#: fields beside its definition that a record keeps of a metric that is not kvsuite's own, so that others can show it
SHOWN_FIELDS = ("title", "label", "shown_in", "format", "group", "limit")


@dataclass(frozen=True)
class Metric:
    """Definition of one number.

    Parameters
    ----------
    name
        Field name; the unit is its suffix (``_s``, ``_bytes``, ``_tok_s``) where it has one.
    unit
        Unit as text, ``"1"`` for a pure number.
    better
        Direction, ``"none"`` for a fact without one.
    metric_class
        ``deterministic`` (bytes, counts), ``near_deterministic`` (perplexity, allocator peaks), ``timed``, ``ambient``: what
        a comparison makes of a difference.
    formula
        How the number is computed, in words a reader can check.
    version
        Raised when the formula changes; numbers of different versions are not compared.
    title
        What the page calls it; made of the name where it is empty.
    label
        A short title for columns of the console and the line of a finished case; the title where it is empty.
    shown_in
        A larger unit that tables convert to, of `LARGER_UNITS`; empty for the metric's own.
    format
        How tables write the number: a format specification such as ``.2f``, ``.1e`` or ``.2%``.
    group
        What plots sort it under; by the unit where it is empty.
    headline
        Rank among the metrics that are shown before a reader chooses, the smallest first; ``None`` for the others. Metrics of
        others are shown behind all of them.
    alias
        A shorter name that options and rules take as well.
    limit
        How far it may move in a comparison whose rules are ``default``: ``+2%``, ``-0.005``; empty for as far as it likes.
    judged_by
        The metric whose verdict stands for this one, where it is never judged itself.

    Raises
    ------
    ValueError
        If format or larger unit are none.
    """

    name: str
    unit: str
    better: Better
    metric_class: MetricClass
    formula: str
    version: int = 1
    title: str = ""
    label: str = ""
    shown_in: str = ""
    format: str = ".5g"
    group: Group | Literal[""] = ""
    headline: int | None = None
    alias: str = ""
    limit: str = ""
    judged_by: str = ""

    def __post_init__(self) -> None:
        if not _FORMAT.fullmatch(self.format):
            raise ValueError(f"metric {self.name!r}: {self.format!r} is no format; write .2f, .3g, .1e or .2%")
        if self.shown_in and LARGER_UNITS.get(self.shown_in, ("",))[0] != self.unit:
            raise ValueError(
                f"metric {self.name!r}: {self.unit} cannot be shown in {self.shown_in}; leave it out or use one of "
                f"{', '.join(LARGER_UNITS)}"
            )

    @property
    def heading(self) -> str:
        """What the page calls it."""
        if self.title:
            return self.title
        name = self.name
        for suffix in ("_bytes", "_tok_s", "_s"):
            name = name.removesuffix(suffix)
        return name.replace("_", " ")

    @property
    def column(self) -> str:
        """Its title in a table of the console: the label, with the unit where the label does not say it."""
        label = self.label or self.title or self.name
        if self.shown_in:
            return f"{label} {self.shown_in}"
        return label if self.unit in _SILENT_UNITS else f"{label}({self.unit})"

    @property
    def plot_group(self) -> Group:
        """`group`, by the unit where that is empty."""
        if self.group:
            return self.group
        if self.unit == "bytes":
            return "memory"
        return "speed" if self.unit in ("s", "tok/s") else "other"

    def text(self, value: float, spec: str = "") -> str:
        """The number as tables write it, in `shown_in`, without its unit."""
        factor = LARGER_UNITS[self.shown_in][1] if self.shown_in else 1.0
        return format(value / factor, spec or self.format)

    def line(self, value: float) -> str:
        """Label, number and unit: ``TTFT 12.40 ms``."""
        unit, factor, spec = _IN_A_LINE.get(self.unit, ("" if self.unit == "1" else self.unit, 1.0, self.format))
        return f"{self.label or self.heading} {value * factor:{spec}} {unit}".rstrip()

    def shown_fields(self) -> dict[str, str]:
        """What a record keeps so that others can show and judge the number: those of `SHOWN_FIELDS` that are set."""
        return {name: found for name in SHOWN_FIELDS if (found := getattr(self, name))}

    def is_of(self, entry: Mapping[str, Any]) -> bool:
        """Whether a record's entry was measured by this definition."""
        return (
            entry.get("unit") == self.unit
            and entry.get("formula") == self.formula
            and entry.get("version") == self.version
            and entry.get("better") == self.better
            and entry.get("class") == self.metric_class
        )

    @classmethod
    def of_entry(cls, name: str, entry: Mapping[str, Any]) -> Metric:
        """The metric that a record's entry tells of; what it says of its looks and cannot be used is left out."""
        shown = {field: entry[field] for field in SHOWN_FIELDS if isinstance(entry.get(field), str)}
        if not _FORMAT.fullmatch(shown.get("format", cls.format)):
            del shown["format"]
        unit = str(entry.get("unit") or "1")
        if LARGER_UNITS.get(shown.get("shown_in", ""), ("",))[0] != unit:
            shown.pop("shown_in", None)
        if shown.get("group", "other") not in get_args(Group):
            del shown["group"]
        return cls(
            name=name,
            unit=unit,
            better=entry["better"] if entry.get("better") in get_args(Better) else "none",
            metric_class=entry["class"] if entry.get("class") in get_args(MetricClass) else "ambient",
            formula=str(entry.get("formula", "")),
            version=entry["version"] if isinstance(entry.get("version"), int) else 1,
            **({"title": name} | shown),
        )
