"""The console table of the compression suite: the original's columns first, then spread, then changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .aggregate import (
    COMPRESSION,
    GIB,
    MIB,
    Row,
    baseline_for,
    by_name,
    change,
    ci_half_width,
    entry,
    failure,
    is_baseline,
    missing_reason,
    suite_rows,
    value,
)

# the original's columns and widths; with single spaces between them they are its 100 characters
_COLUMNS = (
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
_MISSING = "n/a"


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
    rows = suite_rows(rows, COMPRESSION)
    labelled = by_name(rows)
    first = max(25, *(len(name) for name in labelled))
    header = _join("Method", first, [f"{title:>{width}}" for title, width, _ in _COLUMNS])
    rule = max(100, len(header))
    lines = [header, "-" * rule]
    for name, row in labelled.items():
        if row["status"] != "ok":
            lines.append(f"{name:<{first}} {failure(row)}")
            continue
        lines.append(
            _join(name, first, [f"{text:>{width}}" for text, (_, width, _) in zip(_cells(row), _COLUMNS, strict=True)])
        )
    lines.append("=" * rule)
    lines += _changes(labelled, first)
    notes = _footnotes(labelled)
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def _join(name: str, first: int, cells: Sequence[str]) -> str:
    return " ".join([f"{name:<{first}}", *cells])


def _format(number: float | None, spec: str) -> str:
    return _MISSING if number is None else format(number, spec)


def _scaled(number: float | None, unit: int) -> float | None:
    return None if number is None else number / unit


def _cells(row: Row) -> list[str]:
    cache = value(row, "cache_tokens_mean")
    return [
        _format(value(row, "ttft"), ".4f"),
        _format(value(row, "tpot"), ".4f"),
        _format(value(row, "throughput"), ".2f"),
        _format(value(row, "perplexity"), ".2f"),
        _format(value(row, "accuracy"), ".2%"),
        _format(_scaled(value(row, "peak_vram"), GIB), ".2f"),
        _format(cache, ".0f"),
        _tpot_spread(row),
        _format(value(row, "perplexity_se"), ".2f"),
        _ratio(row),
        _format(_scaled(value(row, "kv_bytes_exact"), MIB), ".2f"),
    ]


def _tpot_spread(row: Row) -> str:
    half, mean = ci_half_width(row, "tpot"), entry(row, "tpot").get("mean")
    return _MISSING if half is None or not mean else f"{half / mean:.1%}"


def _ratio(row: Row) -> str:
    ratio, se = value(row, "ppl_ratio"), value(row, "ppl_ratio_se")
    if ratio is None:
        return _MISSING
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
        lines.append(_join(name, first, [f"{_signed(number):>10}" for number in changes]))
    if lines:
        title = "Change against baseline (TPOT: 1 - x/b, positive is faster; all others: x/b - 1)"
        return ["", title, _join("Method", first, [f"{title:>10}" for title in _CHANGES]), *lines]
    if any(is_baseline(row) for row in rows):
        return ["", "Change against baseline: none; no other case finished beside a finished baseline"]
    return ["", "Change against baseline: none; the run has no baseline"]


def _signed(number: float | None) -> str:
    # adding 0.0 turns a rounded -0.0 into 0.0
    return _MISSING if number is None else f"{round(100 * number, 1) + 0.0:+.1f}%"


def _footnotes(labelled: Mapping[str, Row]) -> list[str]:
    finished = {name: row for name, row in labelled.items() if row["status"] == "ok"}
    notes: list[str] = []
    seen: set[tuple[str, str]] = set()
    for title, _, metric in _COLUMNS:
        names: dict[str, list[str]] = {}
        for name, row in finished.items():
            if value(row, metric) is None:
                names.setdefault(missing_reason(row, metric), []).append(name)
        for reason, affected in names.items():
            column = title.partition("(")[0].rstrip("±")
            if (column, reason) not in seen:
                seen.add((column, reason))
                notes.append(f"{column}: {reason}" + _which(affected, finished))
    single = [
        name for name, row in finished.items() if value(row, "tpot") is not None and _tpot_spread(row) == _MISSING
    ]
    if single:
        notes.append("TPOT±: needs at least 2 rounds" + _which(single, finished))
    warnings: dict[str, list[str]] = {}
    for name, row in labelled.items():
        for warning in row["warnings"]:
            warnings.setdefault(" ".join(str(warning).split()), []).append(name)
    return notes + [f"warning: {text}" + _which(names, labelled) for text, names in warnings.items()]


def _which(affected: Sequence[str], among: Mapping[str, Row]) -> str:
    return "" if len(affected) == len(among) else f" ({', '.join(affected)})"
