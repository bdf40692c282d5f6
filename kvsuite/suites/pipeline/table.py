"""The console table of the pipeline suite: what is served, how well, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvsuite import console
from kvsuite.reporting.aggregate import Row, by_name, suite_rows, value
from kvsuite.reporting.table_parts import MISSING, MetricColumn, case_table, footnotes, own_columns

from .rows import arrivals_of, setting_of, speedup, workload_name

if TYPE_CHECKING:
    from rich.console import RenderableType


def pipeline_table(rows: Sequence[Row]) -> RenderableType:
    """A line a case: throughput of outputs and beside the baseline, goodput, latencies, what ran together, quality.

    Raises
    ------
    UserError
        If no row is of the pipeline suite.
    """
    rows = suite_rows(rows, "pipeline")
    labelled = by_name(rows)
    columns = [
        MetricColumn("output_tok_s", 8, title="Output/s", spec=".1f"),
        MetricColumn("", 7, title="vs base", cell=partial(_speedup, rows=rows)),
        MetricColumn("goodput_req_s", 8),
        MetricColumn("slo_share", 6),
        *([MetricColumn("capacity_req_s", 8)] if any("capacity_req_s" in row["metrics"] for row in rows) else []),
        MetricColumn("ttft_p50_s", 9),
        MetricColumn("tpot_p50_s", 9),
        MetricColumn("itl_p99_s", 9),
        MetricColumn("running_mean", 7),
        MetricColumn("preemptions", 7, title="Preempt"),
        MetricColumn("served_kld", 8, spec=".4f"),
        MetricColumn("served_same_top1", 7),
        *own_columns(rows),
    ]
    return console.stacked(
        _settings(rows),
        [case_table("Case", labelled, columns)],
        [*_unmet(rows), *_inert(rows), *footnotes(labelled, columns)],
    )


def pipeline_legend(rows: Sequence[Row]) -> str:
    """What the columns of `pipeline_table` mean."""
    return (
        "Output/s: output tokens of all requests over the wall time. vs base: logical tokens a second in units of the "
        "baseline of the same workload and pool. Goodput: requests a second that meet the SLO, SLO: their share. Capacity: the "
        "highest rate of arrivals at which 90 % do. TTFT from the "
        "scheduled arrival, TPOT of a request without its first token, ITL: gaps of all requests. Running: requests that hold "
        "blocks, mean over time. KL, Top1: of the continuation as served against the full cache."
    )


def _speedup(row: Row, rows: Sequence[Row]) -> str:
    found = speedup(row, rows)
    return MISSING if found is None else f"{found:.2f}x"


def _settings(rows: Sequence[Row]) -> list[str]:
    """What is the same for the variants of a workload, once each."""
    lines = []
    for row in rows:
        workload, plan, params = row["case"]["workload"], row["case"]["params"]["serving"], row["case"]["params"]
        pool = f"{plan['pool_blocks']} blocks" if plan["pool_bytes"] is None else f"{plan['pool_bytes']} bytes"
        lines.append(
            f"{workload_name(row)}, {workload['requests']} requests of up to {workload['prompt_tokens']} + "
            f"{workload['max_new_tokens']} tokens, arrivals {arrivals_of(row)}, pool of {pool}, SLO {params['slo']}"
        )
    return list(dict.fromkeys(lines))


def _unmet(rows: Sequence[Row]) -> list[str]:
    """A line for each setting in which no case has a request that meets the SLO: a goodput of 0 compares nothing."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if value(row, "slo_share") is not None:
            groups.setdefault((setting_of(row), str(row["case"]["params"]["slo"])), []).append(row)
    lines = []
    for (_, slo), group in groups.items():
        if any(value(row, "slo_share") for row in group):
            continue
        workload = group[0]["case"]["workload"]
        medians = [
            f"{name} {min(found):.3g} s"
            for name, metric in (("TTFT", "ttft_p50_s"), ("TPOT", "tpot_p50_s"))
            if (found := [number for row in group if (number := value(row, metric)) is not None])
        ]
        lowest = f" (lowest medians: {', '.join(medians)})" if medians else ""
        lines.append(
            f"{workload['workload']}, {workload['requests']} requests: none of any case meets the SLO {slo}{lowest}, so "
            "goodput tells no case from another; give a --kv-slo that this machine can meet"
        )
    return lines


def _inert(rows: Sequence[Row]) -> list[str]:
    """Every reason for which an axis changed nothing, with the cases it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "ok":
            for axis, reason in row["inert"].items():
                reasons.setdefault(f"{axis} inert: {reason}", []).append(str(row["case"]["name"]))
    return [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
