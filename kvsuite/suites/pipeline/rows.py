"""What rows of the pipeline suite are to each other: the baseline of a row, and how much faster than it a row served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsuite.case import canonical_json
from kvsuite.reporting.aggregate import Row, value
from kvsuite.reporting.machines import machine_of

from .variants import BASELINE

#: logical tokens a second: what the original calls throughput, of which a speed-up is the ratio
THROUGHPUT = "total_tok_s_logical"


def is_baseline(row: Row) -> bool:
    """Whether the row is one that others are compared with: full caches, prompts first, one stream."""
    return bool(row["case"]["params"].get("variant") == BASELINE)


def baseline_for(row: Row, rows: Sequence[Row]) -> Row | None:
    """The baseline of the same engine, model, weights, device, workload and pool, finished or not.

    The last one of those, if a resumed run has measured a failed one again.
    """
    return next(
        (other for other in reversed(rows) if is_baseline(other) and setting_of(other) == setting_of(row)), None
    )


def speedup(row: Row, rows: Sequence[Row]) -> float | None:
    """Logical tokens a second in units of the baseline's; ``None`` where either has none, or they are two machines'."""
    baseline = baseline_for(row, rows)
    if baseline is not None and machine_of(baseline) != machine_of(row):
        return None
    own, base = value(row, THROUGHPUT), None if baseline is None else value(baseline, THROUGHPUT)
    return None if own is None or not base else own / base


def arrivals_of(row: Row) -> str:
    """When a case's requests come, for a reader: ``closed``, ``closed, 4 under way``, ``poisson at 2 a second``."""
    workload = row["case"]["workload"]
    found = str(workload["arrivals"])
    if workload["arrival_rate"] is not None:
        found += f" at {workload['arrival_rate']:g} a second"
    if workload.get("time_scale", 1) != 1:
        found += f", {workload['time_scale']:g} times as fast"
    if workload.get("concurrency") is not None:
        found += f", {workload['concurrency']} under way"
    return found


def workload_name(row: Row) -> str:
    """What is served, for a reader: ``synthetic-long``, ``synthetic-long, one image each``."""
    workload = row["case"]["workload"]
    return f"{workload.get('workload')}{', one image each' if workload.get('image') else ''}"


def setting_of(row: Row) -> str:
    """What rows that are compared with each other have in common: engine, model, device, workload and pool."""
    case = row["case"]
    plan: dict[str, Any] = case["params"].get("serving") or {}
    pool = {name: plan.get(name) for name in ("pool_blocks", "pool_bytes", "max_num_seqs", "prefix_caching")}
    axes = [case[axis] for axis in ("engine", "model", "quantization", "dtype", "workload")]
    return canonical_json([str(case["device"]).partition(":")[0], *axes, pool])
