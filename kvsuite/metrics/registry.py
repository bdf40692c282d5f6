"""The registry of every metric that a record may use, and the statistics of repeated samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median, stdev
from typing import Any

from .builtin import BUILTIN
from .metric import Better, Metric, MetricClass

__all__ = [
    "ALIASES",
    "BUILTIN",
    "Better",
    "Metric",
    "MetricClass",
    "MetricRegistry",
    "metric_of",
    "percentile",
    "summarise",
]

_OWN = {metric.name: metric for metric in BUILTIN}
# one table serves the options, the originals' files and ours
ALIASES = {metric.alias: metric.name for metric in BUILTIN if metric.alias}


def metric_of(name: str, entry: Mapping[str, Any] | None = None) -> Metric:
    """The metric of that name or alias, defined as a record's ``entry`` says: another version may have measured it."""
    name = ALIASES.get(name, name)
    own = _OWN.get(name)
    if own is not None and (entry is None or own.is_of(entry)):
        return own
    told = Metric.of_entry(name, entry or {})
    if own is None or own.unit != told.unit:
        return told
    return replace(own, better=told.better, metric_class=told.metric_class, formula=told.formula, version=told.version)


def is_headline(name: str) -> bool:
    """Whether the metric is shown before a reader chooses: kvsuite's headlines, and all metrics of others."""
    return name not in _OWN or _OWN[name].headline is not None


def is_builtin(name: str) -> bool:
    """Whether kvsuite defines the metric."""
    return name in _OWN


class MetricRegistry:
    """Metrics by name; hooks add their own before the first case runs."""

    def __init__(self, metrics: Iterable[Metric] = BUILTIN) -> None:
        self._metrics: dict[str, Metric] = {}
        for metric in metrics:
            self.add(metric)

    def add(self, metric: Metric) -> None:
        """Register ``metric``; the same definition twice is harmless, another one under a taken name is an error."""
        known = self._metrics.setdefault(metric.name, metric)
        if known != metric:
            raise ValueError(f"metric {metric.name!r} is already defined as: {known.formula}")

    def __getitem__(self, name: str) -> Metric:
        name = ALIASES.get(name, name)
        try:
            return self._metrics[name]
        except KeyError:
            raise KeyError(f"unknown metric {name!r}; known: {', '.join(sorted(self._metrics))}") from None

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics.values())

    def value(self, name: str, samples: float | int | Sequence[float] | None, **facts: Any) -> dict[str, Any]:
        """Build the record entry of metric ``name`` from one sample, several, or ``None`` with a ``reason``.

        The headline ``value`` is the median of the samples. Extra facts (``clock``, ``protocol``, ``reason``) are kept.

        Raises
        ------
        ValueError
            If the value is ``None`` or not finite without a reason.
        """
        metric = self[name]
        entry: dict[str, Any] = {
            "value": None,
            "unit": metric.unit,
            "better": metric.better,
            "class": metric.metric_class,
            "version": metric.version,
            "formula": metric.formula,
        }
        if not is_builtin(metric.name):
            # who reads the record may not have the package that defines it
            entry |= metric.shown_fields()
        values = [] if samples is None else list(samples) if isinstance(samples, Sequence) else [samples]
        if not values or not all(math.isfinite(v) for v in values):
            if not facts.get("reason"):
                raise ValueError(f"metric {metric.name}: a value that is missing or not finite needs a reason")
            return entry | facts
        entry["value"] = median(values)
        if isinstance(samples, Sequence):
            entry |= summarise(values)
        # a reason explains a missing value, and there is none missing
        return entry | {name: fact for name, fact in facts.items() if name != "reason"}


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Summary statistics of repeated samples: n, mean, median, min, max, std (n-1), cv, se, 95 % t-interval, raw values."""
    n = len(values)
    mean = fmean(values)
    summary: dict[str, Any] = {
        "n": n,
        "mean": mean,
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "p90": percentile(values, 0.90),
        "p99": percentile(values, 0.99),
        "std": None,
        "cv": None,
        "se": None,
        "ci95": None,
        "values": list(values),
    }
    if n >= 2:
        std = stdev(values)
        se = std / math.sqrt(n)
        half = _t_quantile(n - 1) * se
        summary |= {"std": std, "cv": std / mean if mean else None, "se": se, "ci95": [mean - half, mean + half]}
    return summary


def percentile(values: Sequence[float], q: float) -> float | None:
    """Percentile ``q`` in (0, 1) by linear interpolation, ``None`` unless n * (1 - q) >= 1: a p99 of 71 is the maximum."""
    if not values or len(values) * (1 - q) < 1 - 1e-9:
        return None
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@functools.cache
def _t_quantile(dof: int) -> float:
    # what scipy.stats.t asks, without a second of imports
    from scipy.special import stdtrit

    return float(stdtrit(dof, 0.975))
