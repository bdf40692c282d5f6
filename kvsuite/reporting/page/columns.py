"""The columns of the page's case table: which there are, which are shown first, in what unit and with how many decimals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from kvsuite.metrics.registry import BUILTIN, Metric, is_builtin, is_headline, metric_of
from kvsuite.reporting.aggregate import Row
from kvsuite.reporting.machines import has_several_machines

Kind = Literal["text", "number", "metric"]

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_IDENTITY = {
    "suite": "Suite",
    "engine": "Engine",
    "model": "Model",
    "quantization": "Weights as",
    "policy": "Policy",
    "device": "Device",
    "dtype": "Dtype",
}
_SHOWN = ("suite", "model")
#: key of the column that names the node which measured a case
MACHINE = "machine"
_DIGITS, _MOST_DECIMALS, _MOST_PLACES = 4, 5, 9


@dataclass(frozen=True)
class PageColumn:
    """One column.

    Parameters
    ----------
    key
        Name in the page's data: the metric's name, the field of the case, or ``params.<axis>``.
    unit
        As shown, after division by ``scale``.
    group
        ``memory``, ``speed``, ``quality`` or ``other`` of a metric; what the plot's axes are sorted by.
    decimals
        Equal in the whole column, so that points align.
    shown
        Whether it is there before the reader chooses.
    timed
        Whether it is a time or made of times: differences inside the spread of its rounds are none.
    """

    key: str
    title: str
    kind: Kind
    unit: str = ""
    scale: float = 1.0
    decimals: int = 0
    better: str = "none"
    group: str = "other"
    formula: str = ""
    shown: bool = False
    timed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def identity_columns(rows: Sequence[Row]) -> list[PageColumn]:
    """Columns of what a case is, then of the axes of its space; most is in its name, so that few are shown at first."""
    fields = {key: {str(row["case"].get(key) or "") for row in rows} for key in _IDENTITY}
    columns = [
        PageColumn(key, _IDENTITY[key], "text", shown=key in _SHOWN and len(found) > 1)
        for key, found in fields.items()
        if any(found)
    ]
    if has_several_machines(rows):
        columns.append(PageColumn(MACHINE, "Machine", "text", shown=True))
    axes: dict[str, list[Any]] = {}
    for row in rows:
        for axis, setting in row["case"]["params"].items():
            axes.setdefault(str(axis), []).append(setting)
    for axis, settings in axes.items():
        if len({str(setting) for setting in settings}) > 1:
            numbers = all(_is_number(setting) or setting is None for setting in settings)
            columns.append(PageColumn(f"params.{axis}", axis.replace("_", " "), "number" if numbers else "text"))
    return columns


def metric_columns(rows: Sequence[Row]) -> list[PageColumn]:
    """Columns of every metric that a record of these has, headlines first."""
    entries: dict[str, Mapping[str, Any]] = {}
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, entry in row["metrics"].items():
            entries.setdefault(name, entry)
            if row["status"] == "ok" and entry.get("value") is not None:
                values.setdefault(name, []).append(float(entry["value"]))
    metrics = {name: metric_of(name, entry) for name, entry in entries.items()}
    first = sorted(
        filter(is_headline, metrics),
        key=lambda name: (not is_builtin(name), metrics[name].headline or 0),
    )
    order = [*first, *(metric.name for metric in BUILTIN if metric.name in entries and metric.name not in first)]
    return [_metric_column(metrics[name], values.get(name, []), name in first) for name in order]


def _metric_column(metric: Metric, values: Sequence[float], headline: bool) -> PageColumn:
    scale, label = _scale(metric, values)
    return PageColumn(
        key=metric.name,
        title=metric.heading,
        kind="metric",
        unit=label,
        scale=scale,
        decimals=_decimals([value / scale for value in values]),
        better=metric.better,
        group=metric.plot_group,
        formula=metric.formula,
        timed=metric.metric_class == "timed",
        # a column of nothing but reasons is told in one line instead
        shown=headline and bool(values),
    )


def _scale(metric: Metric, values: Sequence[float]) -> tuple[float, str]:
    if metric.format.endswith("%"):
        return 0.01, "%"
    typical = median(abs(value) for value in values) if values else 0.0
    for kind, steps in (("s", _SECONDS), ("bytes", _BYTES)):
        if metric.unit == kind:
            return next((step for step in steps if typical >= step[0]), steps[-1] if typical else steps[0])
    return 1.0, "" if metric.unit == "1" else metric.unit


def _decimals(values: Iterable[float]) -> int:
    """So many that the smallest number keeps four digits, as long as the largest does not become a long one."""
    sizes = [abs(value) for value in values if value]
    if not sizes or all(size == int(size) for size in sizes):
        return 0
    wanted = _DIGITS - 1 - math.floor(math.log10(min(sizes)))
    room = _MOST_PLACES - 1 - math.floor(math.log10(max(max(sizes), 1.0)))
    return max(0, min(wanted, room, _MOST_DECIMALS))


def _is_number(setting: Any) -> bool:
    return isinstance(setting, int | float) and not isinstance(setting, bool)
