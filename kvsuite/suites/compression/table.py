"""The console table of the compression suite: the original's columns first, then spread, then changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvsuite import console
from kvsuite.reporting.aggregate import (
    GIB,
    Row,
    by_name,
    change,
    suite_rows,
    value,
)
from kvsuite.reporting.machines import machine_of
from kvsuite.reporting.noise import MARK, MEANING, inside_noise
from kvsuite.reporting.table_parts import (
    MISSING,
    SPREAD,
    MetricColumn,
    case_table,
    footnotes,
    number_in,
    own_columns,
    tpot_spread,
)

from .figure import MOST_CASES
from .rows import TRAP_MARK, TRAP_MEANING, baseline_for, has_formats, is_baseline, is_full, is_trap_row

if TYPE_CHECKING:
    from rich.console import RenderableType


def _ratio(row: Row) -> str:
    ratio, se = value(row, "ppl_ratio"), value(row, "ppl_ratio_se")
    if ratio is None:
        return MISSING
    mark = TRAP_MARK * is_trap_row(row)
    return f"{mark}{ratio:.4f}" if se is None else f"{mark}{ratio:.4f}±{2 * se:.4f}"


# the original's columns and widths; with single spaces between them they are its 100 characters
_COLUMNS = (
    MetricColumn("ttft"),
    MetricColumn("tpot"),
    MetricColumn("throughput"),
    MetricColumn("perplexity"),
    MetricColumn("accuracy"),
    MetricColumn("peak_vram", title="VRAM(GB)", cell=lambda row: number_in(row, "peak_vram", GIB, ".2f")),
    MetricColumn("cache_tokens_mean", 8),
    MetricColumn("tpot", 7, title="TPOT±", cell=tpot_spread),
    MetricColumn("perplexity_se", 8, spec=".2f"),
    MetricColumn("ppl_ratio", 15, cell=_ratio),
    MetricColumn("kv_bytes_exact"),
)
# to the full cache, token by token; not in runs without
_DISTANCE = (MetricColumn("kld", 9), MetricColumn("same_top1", 8))
_CHANGES = ("Thruput", "TPOT", "PPL", "Acc", "KV bytes")


def comparison_table(rows: Sequence[Row]) -> RenderableType:
    """The compression suite's table, the changes against the baseline, and notes.

    ``TPOT±`` is half the 95 % interval of the mean in percent of the mean, ``PPL±`` one standard error, ``PPL/full``
    the paired ratio to the full cache ± 2 standard errors. A change is positive where throughput, perplexity, accuracy
    or bytes rose; for TPOT positive means faster (1 - x/b), as in the original.

    Raises
    ------
    UserError
        If no row is of the compression suite.
    """
    rows = suite_rows(rows, "compression")
    labelled = by_name(rows)
    distance = [one for one in _DISTANCE if any(value(row, one.metric) is not None for row in rows)]
    columns = [*_COLUMNS, *distance, *own_columns(rows)]
    return console.stacked([case_table("Method", labelled, columns)], _changes(labelled), footnotes(labelled, columns))


def _changes(labelled: Mapping[str, Row]) -> list[RenderableType]:
    rows = list(labelled.values())
    lines: list[tuple[str, list[str]]] = []
    for name, row in labelled.items():
        base = baseline_for(row, rows)
        if row["status"] != "ok" or is_baseline(row) or base is None or base["status"] != "ok":
            continue
        tpot = change(value(row, "tpot"), value(base, "tpot"))
        times = {
            "throughput": change(value(row, "throughput"), value(base, "throughput")),
            "tpot": None if tpot is None else -tpot,
        }
        if machine_of(row) != machine_of(base):
            times = dict.fromkeys(times)
        numbers = times | {
            metric: change(value(row, metric), value(base, metric))
            for metric in ("perplexity", "accuracy", "kv_bytes_exact")
        }
        lines.append(
            (
                name,
                [
                    MARK * (number is not None and inside_noise(row, base, metric)) + _signed(number)
                    for metric, number in numbers.items()
                ],
            )
        )
    if lines:
        noted = [MEANING] if any(cell.startswith(MARK) for _, cells in lines for cell in cells) else []
        first = max(25, *map(len, labelled))
        return [
            "Change against baseline (TPOT: 1 - x/b, positive is faster; all others: x/b - 1)",
            console.Sheet("Method", [console.Column(title, 10) for title in _CHANGES], lines, first, ruled=False),
            *noted,
        ]
    if any(is_baseline(row) for row in rows):
        return ["Change against baseline: none; no other case finished beside a finished baseline"]
    if has_formats(filter(is_full, rows)):
        return [
            "Change against baseline: none; the run has no full cache in the model's dtype (--kv-cache-dtype=auto,...)"
        ]
    return ["Change against baseline: none; the run has no baseline"]


def _signed(number: float | None) -> str:
    # adding 0.0 turns a rounded -0.0 into 0.0
    return MISSING if number is None else f"{round(100 * number, 1) + 0.0:+.1f}%"


def comparison_legend(rows: Sequence[Row]) -> str:
    """What the columns of `comparison_table` mean."""
    legend = (
        f"Thruput: output tokens/s. VRAM: GiB. Cache: tokens, mean over layers. {SPREAD} PPL/full: against the full cache "
        "on the same tokens ± 2 standard errors."
    )
    if any(map(is_trap_row, rows)):
        legend += f"\n{TRAP_MEANING}"
    if len(rows) > MOST_CASES:
        legend += (
            f"\nNo figure: its bars can show {MOST_CASES} cases, these are {len(rows)}; report.html plots them all."
        )
    return legend
