"""The console table of the compression suite: the original's columns first, then spread, then changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsuite.reporting.aggregate import (
    GIB,
    MIB,
    Row,
    baseline_for,
    by_name,
    change,
    failure,
    is_baseline,
    suite_rows,
    value,
)
from kvsuite.reporting.table_parts import (
    MISSING,
    SPREAD,
    Column,
    footnotes,
    format_number,
    join_cells,
    scaled,
    tpot_spread,
)

from .figure import MOST_CASES

# the original's columns and widths; with single spaces between them they are its 100 characters
_COLUMNS: tuple[Column, ...] = (
    ("TTFT(s)", 10, "ttft"),
    ("TPOT(s)", 10, "tpot"),
    ("Thruput", 10, "throughput"),
    ("PPL", 10, "perplexity"),
    ("Acc", 10, "accuracy"),
    ("VRAM(GB)", 10, "peak_vram"),
    ("Cache", 8, "cache_tokens_mean"),
    ("TPOT±", 7, "tpot"),
    ("PPL±", 8, "perplexity_se"),
    ("PPL/full", 15, "ppl_ratio"),
    ("KV MiB", 10, "kv_bytes_exact"),
)
_CHANGES = ("Thruput", "TPOT", "PPL", "Acc", "KV bytes")


def comparison_table(rows: Sequence[Row]) -> str:
    """Render the compression suite as text.

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
    first = max(25, *(len(name) for name in labelled))
    header = join_cells("Method", first, [f"{title:>{width}}" for title, width, _ in _COLUMNS])
    rule = max(100, len(header))
    lines = [header, "-" * rule]
    for name, row in labelled.items():
        if row["status"] != "ok":
            lines.append(f"{name:<{first}} {failure(row)}")
            continue
        lines.append(
            join_cells(
                name, first, [f"{text:>{width}}" for text, (_, width, _) in zip(_cells(row), _COLUMNS, strict=True)]
            )
        )
    lines.append("=" * rule)
    lines += _changes(labelled, first)
    notes = footnotes(labelled, _COLUMNS)
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def _cells(row: Row) -> list[str]:
    cache = value(row, "cache_tokens_mean")
    return [
        format_number(value(row, "ttft"), ".4f"),
        format_number(value(row, "tpot"), ".4f"),
        format_number(value(row, "throughput"), ".2f"),
        format_number(value(row, "perplexity"), ".2f"),
        format_number(value(row, "accuracy"), ".2%"),
        format_number(scaled(value(row, "peak_vram"), GIB), ".2f"),
        format_number(cache, ".0f"),
        tpot_spread(row),
        format_number(value(row, "perplexity_se"), ".2f"),
        _ratio(row),
        format_number(scaled(value(row, "kv_bytes_exact"), MIB), ".2f"),
    ]


def _ratio(row: Row) -> str:
    ratio, se = value(row, "ppl_ratio"), value(row, "ppl_ratio_se")
    if ratio is None:
        return MISSING
    return f"{ratio:.4f}" if se is None else f"{ratio:.4f}±{2 * se:.4f}"


def _changes(labelled: Mapping[str, Row], first: int) -> list[str]:
    rows = list(labelled.values())
    lines: list[str] = []
    for name, row in labelled.items():
        base = baseline_for(row, rows)
        if row["status"] != "ok" or is_baseline(row) or base is None or base["status"] != "ok":
            continue
        tpot = change(value(row, "tpot"), value(base, "tpot"))
        changes = [
            change(value(row, "throughput"), value(base, "throughput")),
            None if tpot is None else -tpot,
            *(
                change(value(row, metric), value(base, metric))
                for metric in ("perplexity", "accuracy", "kv_bytes_exact")
            ),
        ]
        lines.append(join_cells(name, first, [f"{_signed(number):>10}" for number in changes]))
    if lines:
        title = "Change against baseline (TPOT: 1 - x/b, positive is faster; all others: x/b - 1)"
        return ["", title, join_cells("Method", first, [f"{title:>10}" for title in _CHANGES]), *lines]
    if any(is_baseline(row) for row in rows):
        return ["", "Change against baseline: none; no other case finished beside a finished baseline"]
    return ["", "Change against baseline: none; the run has no baseline"]


def _signed(number: float | None) -> str:
    # adding 0.0 turns a rounded -0.0 into 0.0
    return MISSING if number is None else f"{round(100 * number, 1) + 0.0:+.1f}%"


def comparison_legend(rows: Sequence[Row]) -> str:
    """What the columns of `comparison_table` mean."""
    legend = (
        f"Thruput: output tokens/s. VRAM: GiB. Cache: tokens, mean over layers. {SPREAD} PPL/full: against the full cache "
        "on the same tokens ± 2 standard errors."
    )
    if len(rows) > MOST_CASES:
        legend += (
            f"\nNo figure: its bars can show {MOST_CASES} cases, these are {len(rows)}; report.html plots them all."
        )
    return legend
