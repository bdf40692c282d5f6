"""The registry of every metric that a record may use, and the statistics of repeated samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, median, stdev
from typing import Any

from .builtin import BUILTIN, Better, Metric, MetricClass

__all__ = ["ALIASES", "BUILTIN", "Better", "Metric", "MetricClass", "MetricRegistry", "percentile", "summarise"]

# one table serves the options, the originals' files and ours
ALIASES = {
    "peak_vram": "mem_measured_peak_bytes",
    "ttft": "ttft_s",
    "tpot": "tpot_s",
    "decode_tok_s": "decode_tok_s_agg",
    "throughput": "output_tok_s",
    "accuracy": "next_token_acc",
    "ppl": "perplexity",
}


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


def _t_quantile(dof: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, dof))
