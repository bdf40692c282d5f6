"""Sides of a comparison, built from numbers with the real Case, MetricRegistry and Record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.case import Case
from kvsuite.comparison.records import RunFacts, row_of
from kvsuite.comparison.sides import Run, Side
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.record import RUN_SCHEMA, Record

REGISTRY = MetricRegistry()
HOST = {"os": "Linux", "cpu": "EPYC", "cores": 2}
Samples = Mapping[str, Any]


def record(name: str = "a", metrics: Samples | None = None, **fields: Any) -> dict[str, Any]:
    """One record; ``fields`` of the case (``model``, ``dtype``) or of the record (``status``, ``effective``)."""
    facts = {"suite": "compression", "engine": "hf", "model": "m", "device": "cpu", "dtype": "float32"}
    of_case = {key: fields.pop(key) for key in list(fields) if key in facts}
    case = Case(name=name, **facts | of_case)
    made = Record(case=case, id=fields.pop("id", f"b.py::test_{case.suite}[{case.id}]"), rounds=5)
    made.case_key = case.key(model_revision="r", dataset_revision="d")
    for metric, samples in (metrics or {}).items():
        made.metrics[metric] = REGISTRY.value(metric, samples, reason="planted", clock="perf_counter")
    for key, item in fields.items():
        setattr(made, key, item)
    return made.to_dict()


def side(*processes: Sequence[dict[str, Any]], gpu: Mapping[str, Any] | None = None, tokens: Any = None) -> Side:
    """A side of one or several processes, each a list of records; ``tokens`` are sidecar columns by record id."""
    facts = RunFacts(RUN_SCHEMA, "run", environment={"host": HOST, "gpu": dict(gpu or {})})
    runs = tuple(Run(facts, tuple(row_of(row) for row in rows), None, tokens or {}) for rows in processes)
    return Side("side", runs)
