"""The console table of the design-space suite: what a point takes, how fast it is beside its floor, what it does to quality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvsuite.reporting.aggregate import MIB, Row, by_name, entry, failure, suite_rows, value
from kvsuite.reporting.table_parts import MISSING, Column, footnotes, format_number, join_cells, scaled

from .rows import DSE

_COLUMNS: tuple[Column, ...] = (
    ("TTFT(s)", 9, "ttft"),
    ("Chunks", 6, "prefill_steps"),
    ("Step(s)", 8, "decode_step_s"),
    ("Step±", 6, "decode_step_s"),
    ("Floor", 6, "tpot_floor_s"),
    ("Decode/s", 9, "decode_tok_s_batch"),
    ("PPL", 8, "perplexity"),
    ("PPL±", 6, "perplexity_se"),
    ("KV MiB", 8, "kv_bytes_exact"),
    ("Pool MiB", 8, "pool"),
    ("Pred MiB", 9, "predicted"),
    ("Peak MiB", 9, "mem_measured_peak_bytes"),
)
_CACHED: Column = ("Cached(s)", 9, "ttft_cached_s")
_FORMATS = {
    "ttft": ".4f",
    "ttft_cached_s": ".4f",
    "prefill_steps": ".0f",
    "decode_step_s": ".4f",
    "decode_tok_s_batch": ".1f",
    "perplexity": ".3f",
    "perplexity_se": ".3f",
}
# columns that are no metrics: fields of the record's memory
_POOL, _PREDICTED = "pool", "predicted"


def dse_table(rows: Sequence[Row]) -> str:
    """Render the design-space suite as text, a line for each point, those without numbers with their reason.

    ``Step`` is a decode step of the whole batch, ``Floor`` the share of it that reading weights and cache once would take,
    ``Step±`` half the 95 % interval of its mean.

    Raises
    ------
    UserError
        If no row is of the design-space suite.
    """
    labelled = by_name(suite_rows(rows, DSE))
    columns = list(_COLUMNS)
    if any(value(row, _CACHED[2]) is not None for row in labelled.values()):
        columns.insert(1, _CACHED)
    first = max(25, *(len(name) for name in labelled))
    header = join_cells("Point", first, [f"{title:>{width}}" for title, width, _ in columns])
    rule = max(100, len(header))
    lines = [*_settings(list(labelled.values())), header, "-" * rule]
    for name, row in labelled.items():
        if row["status"] != "ok":
            lines.append(f"{name:<{first}} {failure(row)}")
            continue
        lines.append(join_cells(name, first, [f"{_cell(row, column):>{column[1]}}" for column in columns]))
    lines.append("=" * rule)
    measured = [column for column in columns if column[2] not in (_POOL, _PREDICTED)]
    notes = [*_inert(labelled.values()), *footnotes(labelled, measured)]
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


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
    return list(dict.fromkeys(lines)) + ([""] if lines else [])


def _cell(row: Row, column: Column) -> str:
    title, _, metric = column
    if metric == _POOL:
        return format_number(scaled(row["memory"]["measured"].get("kv_bytes_allocated"), MIB), ".2f")
    if metric == _PREDICTED:
        return format_number(scaled(row["memory"]["predicted"].get("total_bytes"), MIB), ".1f")
    found = value(row, metric)
    if title == "Step±":
        return _spread(row)
    if metric == "tpot_floor_s":
        step = value(row, "decode_step_s")
        return MISSING if not step or found is None else f"{found / step:.0%}"
    if metric == "kv_bytes_exact":
        return format_number(scaled(found, MIB), ".2f")
    if metric == "mem_measured_peak_bytes":
        return format_number(scaled(found, MIB), ".1f")
    return format_number(found, _FORMATS[metric])


def _spread(row: Row) -> str:
    found = entry(row, "decode_step_s")
    interval, mean = found.get("ci95"), found.get("mean")
    return MISSING if interval is None or not mean else f"{(interval[1] - interval[0]) / 2 / mean:.1%}"


def _inert(rows: Iterable[Row]) -> list[str]:
    """Every reason for which an axis changed nothing, with the points it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] in ("ok", "skipped"):
            for axis, reason in row["inert"].items():
                reasons.setdefault(f"{axis} inert: {reason}", []).append(str(row["case"]["name"]))
    return [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
