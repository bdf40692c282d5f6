"""The console table of the design-space suite: what a point takes, how fast it is beside its floor, what it does to quality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvsuite import console
from kvsuite.reporting.aggregate import MIB, Row, by_name, entry, suite_rows, value
from kvsuite.reporting.table_parts import MISSING, MetricColumn, case_table, footnotes, format_number, own_columns

from .rows import DSE

if TYPE_CHECKING:
    from rich.console import RenderableType


def _spread(row: Row) -> str:
    found = entry(row, "decode_step_s")
    interval, mean = found.get("ci95"), found.get("mean")
    return MISSING if interval is None or not mean else f"{(interval[1] - interval[0]) / 2 / mean:.1%}"


def _floor_share(row: Row) -> str:
    floor, step = value(row, "tpot_floor_s"), value(row, "decode_step_s")
    return MISSING if not step or floor is None else f"{floor / step:.0%}"


def _pool(row: Row) -> str:
    return format_number(row["memory"]["measured"].get("kv_bytes_allocated"), ".2f", MIB)


def _predicted(row: Row) -> str:
    return format_number(row["memory"]["predicted"].get("total_bytes"), ".1f", MIB)


_COLUMNS = (
    MetricColumn("ttft", 9),
    MetricColumn("prefill_steps", 6),
    MetricColumn("decode_step_s", 8),
    MetricColumn("decode_step_s", 6, title="Step±", cell=_spread),
    MetricColumn("tpot_floor_s", 6, title="Floor", cell=_floor_share),
    MetricColumn("decode_tok_s_batch", 9),
    MetricColumn("perplexity", 8, spec=".3f"),
    MetricColumn("perplexity_se", 6),
    MetricColumn("kv_bytes_exact", 8),
    MetricColumn("", 8, title="Pool MiB", cell=_pool),
    MetricColumn("", 9, title="Pred MiB", cell=_predicted),
    MetricColumn("mem_measured_peak_bytes", 9),
)
_CACHED = MetricColumn("ttft_cached_s", 9)


def dse_table(rows: Sequence[Row]) -> RenderableType:
    """The design-space suite's table: a line for each point, those without numbers with their reason.

    ``Step`` is a decode step of the whole batch, ``Floor`` the share of it that reading weights and cache once would take,
    ``Step±`` half the 95 % interval of its mean.

    Raises
    ------
    UserError
        If no row is of the design-space suite.
    """
    rows = suite_rows(rows, DSE)
    labelled = by_name(rows)
    columns = [*_COLUMNS, *own_columns(rows)]
    if any(value(row, _CACHED.metric) is not None for row in rows):
        columns.insert(1, _CACHED)
    return console.stacked(
        _settings(rows),
        [case_table("Point", labelled, columns)],
        [*_inert(rows), *footnotes(labelled, columns)],
    )


def dse_legend(rows: Sequence[Row]) -> str:
    """What the columns of `dse_table` mean."""
    return (
        "TTFT: mean over the requests of a round. Chunks: steps that fed prompts. Step: of the whole batch. Step±: half the "
        "95 % interval of its mean. Floor: of the step, to read weights and cache once. Decode/s: tokens of all requests. "
        "PPL±: 1 standard error. KV: stored at the end, Pool: allocated, Pred: weights, pool and workspace from the "
        "configuration."
    )


def _settings(rows: Sequence[Row]) -> list[str]:
    """What the points have in common, once each."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            continue
        workload, dataset = row["case"]["workload"], row["dataset"]
        lines.append(f"{workload['max_new_tokens']} new tokens for each request, prefix cache off")
        if workload["prefix_caching"]:
            lines[-1] = f"{workload['max_new_tokens']} new tokens for each request, every prompt served twice"
        if dataset is not None:
            text = dataset["text_hash"].removeprefix("sha256:")[:8]
            lines.append(f"perplexity: {dataset['name']}, in streams as long as the context, text {text}")
            lines += [f"  note: {note}" for note in dataset["notes"]]
    return list(dict.fromkeys(lines))


def _inert(rows: Iterable[Row]) -> list[str]:
    """Every reason for which an axis changed nothing, with the points it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] in ("ok", "skipped"):
            for axis, reason in row["inert"].items():
                reasons.setdefault(f"{axis} inert: {reason}", []).append(str(row["case"]["name"]))
    return [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
