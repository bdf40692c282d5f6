"""Metrics that other packages bring, by the entry-point group ``kvsuite.metrics``: each names a Metric, or a list of them."""

from __future__ import annotations

from functools import cache

from kvsuite.entry_points import METRICS, described, find, load, package, warn
from kvsuite.errors import UserError

from .builtin import BUILTIN
from .metric import Metric


@cache
def installed_metrics() -> tuple[Metric, ...]:
    """Every metric that can be used; what cannot is told of on stderr, and the others go on working."""
    taken = dict.fromkeys((metric.name for metric in BUILTIN), "kvsuite")
    found: list[Metric] = []
    for entry in find(METRICS).values():
        try:
            given = load(entry)
        except UserError as error:
            warn(str(error))
            continue
        for metric in given if isinstance(given, list | tuple) else [given]:
            if not isinstance(metric, Metric):
                warn(f"{described(entry)}: {metric!r} is no Metric; name a kvsuite.metrics.Metric, or a list of them")
            elif metric.name in taken:
                warn(f"{described(entry)}: the metric {metric.name} is taken by {taken[metric.name]}; rename it")
            else:
                taken[metric.name] = package(entry)
                found.append(metric)
    return tuple(found)
