"""Metric: what a number is called, which way is better, how it comes about. The registry holds every one a record may use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any, Literal

MetricClass = Literal["deterministic", "near_deterministic", "timed", "ambient"]
Better = Literal["lower", "higher", "none"]

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
        ``deterministic`` (bytes, counts), ``near_deterministic`` (perplexity, allocator peaks), ``timed``, ``ambient``.
    formula
        How the number is computed, in words a reader can check.
    version
        Raised when the formula changes; numbers of different versions are not compared.
    """

    name: str
    unit: str
    better: Better
    metric_class: MetricClass
    formula: str
    version: int = 1


_T: MetricClass = "timed"
_D: MetricClass = "deterministic"
_N: MetricClass = "near_deterministic"
_A: MetricClass = "ambient"

BUILTIN: tuple[Metric, ...] = (
    Metric("ttft_s", "s", "lower", _T, "t1 - t0: prefill, cache compression of the prompt, first sampled token"),
    Metric("e2e_s", "s", "lower", _T, "tn - t0"),
    Metric("tpot_s", "s", "lower", _T, "(e2e_s - ttft_s) / (n - 1)"),
    Metric("itl_s", "s", "lower", _T, "t(k+1) - t(k), raw gaps pooled over rounds (pooled_tokens)"),
    Metric(
        "prefill_s",
        "s",
        "lower",
        _T,
        "prompt forward, t0 to logits; holds compress_s where a method compresses inside the forward",
    ),
    Metric(
        "compress_s",
        "s",
        "lower",
        _T,
        "time spent selecting and copying the prompt's cache, measured in the separate instrumented pass",
    ),
    Metric(
        "evict_s",
        "s",
        "lower",
        _T,
        "time per decode step spent selecting and evicting, measured in the separate instrumented pass",
    ),
    Metric("prefill_tok_s_computed", "tok/s", "higher", _T, "prompt tokens that went through the model / prefill_s"),
    Metric("prefill_tok_s_logical", "tok/s", "higher", _T, "prompt tokens / prefill_s"),
    Metric("decode_tok_s_req", "tok/s", "higher", _T, "1 / tpot_s of one request"),
    Metric("decode_tok_s_agg", "tok/s", "higher", _T, "sum(n_i - 1) / (max tn - min t1)"),
    Metric("output_tok_s", "tok/s", "higher", _T, "sum n_i / wall; includes TTFT, not a decode speed"),
    Metric("first_step_s", "s", "lower", _T, "one token through an empty cache: what the original called TTFT"),
    Metric(
        "tpot_floor_s",
        "s",
        "none",
        _A,
        "(weights a step reads + mean cache bytes of the decode phase) / measured copy bandwidth: no step is faster",
    ),
    Metric(
        "perplexity", "1", "lower", _N, "exp(nll_sum / nll_tokens), natural log, log-softmax in float32, texts pooled"
    ),
    Metric("perplexity_se", "1", "none", _N, "perplexity * sqrt(var(nll) / (n - 1)); a lower bound, losses correlate"),
    Metric("nll_sum", "nat", "lower", _N, "sum of -log p(token) over the scored tokens"),
    Metric("nll_tokens", "tokens", "none", _D, "number of scored tokens"),
    Metric(
        "perplexity_full",
        "1",
        "lower",
        _N,
        "perplexity of the same tokens with the full cache: one teacher-forced forward",
    ),
    Metric("ppl_ratio", "1", "lower", _N, "exp(mean paired difference of nll against the full cache)"),
    Metric("ppl_ratio_se", "1", "none", _N, "ppl_ratio * standard error of the mean paired nll difference"),
    Metric("next_token_acc", "1", "higher", _N, "teacher-forced top-1 hits / scored tokens"),
    Metric("kv_bytes_exact", "bytes", "lower", _D, "sum of the distinct live cache storages at the end of decode"),
    Metric(
        "kv_bytes_exact_prefill", "bytes", "lower", _D, "sum of the distinct live cache storages at the end of prefill"
    ),
    Metric(
        "mem_predicted_kv_bytes",
        "bytes",
        "lower",
        _D,
        "sum over layers of 2 * kv_heads * head_dim * bytes * kept tokens",
    ),
    Metric("cache_tokens_mean", "tokens", "lower", _D, "mean over layers of the cached tokens at the end of decode"),
    Metric("cache_tokens_min", "tokens", "lower", _D, "fewest cached tokens of a layer at the end of decode"),
    Metric("cache_tokens_max", "tokens", "lower", _D, "most cached tokens of a layer at the end of decode"),
    Metric("ratio_requested", "1", "none", _D, "fraction of the prompt's cache a method was asked to remove"),
    Metric(
        "ratio_effective",
        "1",
        "higher",
        _D,
        "1 - cache bytes of the method / cache bytes of the full cache, end of prefill",
    ),
    Metric("mem_weights_bytes", "bytes", "lower", _D, "sum of the distinct parameter and buffer storages"),
    Metric("mem_measured_before_bytes", "bytes", "none", _N, "allocated right before the prefill phase"),
    Metric("mem_measured_prefill_peak_bytes", "bytes", "lower", _N, "peak allocated in the prefill phase"),
    Metric("mem_measured_decode_peak_bytes", "bytes", "lower", _N, "peak allocated in the decode phase"),
    Metric("mem_measured_peak_bytes", "bytes", "lower", _N, "larger of the prefill and the decode allocated peaks"),
    Metric("mem_measured_dynamic_bytes", "bytes", "lower", _N, "mem_measured_peak_bytes - mem_measured_before_bytes"),
    Metric("mem_measured_reserved_bytes", "bytes", "none", _A, "peak reserved by torch's caching allocator"),
    Metric("mem_measured_driver_bytes", "bytes", "none", _A, "peak of NVML used memory, sampled in another process"),
    Metric("mem_measured_rss_peak_bytes", "bytes", "none", _A, "peak resident set of the process over the memory pass"),
)


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
