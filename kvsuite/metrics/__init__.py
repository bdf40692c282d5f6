"""Metrics: what a number is called, which way is better, how it comes about."""

from .builtin import BUILTIN
from .metric import Better, Metric, MetricClass
from .registry import ALIASES, MetricRegistry, metric_of, percentile, summarise

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
