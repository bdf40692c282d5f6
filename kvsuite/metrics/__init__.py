"""Metrics: what a number is called, which way is better, how it comes about."""

from .builtin import BUILTIN, Better, Metric, MetricClass
from .registry import ALIASES, MetricRegistry, percentile, summarise

__all__ = ["ALIASES", "BUILTIN", "Better", "Metric", "MetricClass", "MetricRegistry", "percentile", "summarise"]
