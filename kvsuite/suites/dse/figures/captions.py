"""What a reader must know about the numbers of design-space CSVs: their sources, what they are not, what repeats do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from kvsuite.suites.dse.columns import AXES, KEY
from kvsuite.suites.dse.csv_files import METRICS, RESULTS, CsvSheet

from .points import MEMORY_COLUMNS, QUANTITIES, Sample, blocks, memory_column, spreads, written
from .series import short_tags

#: repeats that differ by more are not one machine in one state
_ONE_MACHINE = 1.1
_NAMED = 3


def source_caption(sheets: Sequence[CsvSheet]) -> str:
    """The files that a figure is drawn from."""
    if len(sheets) < _NAMED:
        names = ", ".join(f"{Path(sheet.source).name} ({len(sheet.rows)} rows)" for sheet in sheets)
        return f"Source: {names}."
    parts = []
    for table in (RESULTS, METRICS):
        chosen = [sheet for sheet in sheets if sheet.table is table]
        short = short_tags([sheet.tag for sheet in chosen])
        if chosen:
            rows = ", ".join(f"{short[sheet.tag]} {len(sheet.rows)}" for sheet in chosen)
            parts.append(f"{len(chosen)} files {table.prefix}*.csv (rows: {rows})")
    return f"Source: {'; '.join(parts)}."


def memory_caption(sheets: Sequence[CsvSheet], quantity: str) -> str | None:
    """What the drawn memory column is, tag by tag where the files differ; ``None`` if no file has one."""
    sources: dict[str, list[str]] = {}
    for sheet in sheets:
        column = memory_column([row for row in sheet.rows if row["status"] in (None, "ok")], quantity)
        if column:
            sources.setdefault(MEMORY_COLUMNS[quantity][column], []).append(sheet.tag)
    if not sources:
        return None
    alone = len(sources) == 1
    said = "; ".join(words if alone else f"{words} ({', '.join(tags)})" for words, tags in sources.items())
    return f"{QUANTITIES[quantity].short} (MB of 2^20 bytes): {said}."


def slope_caption(samples: Sequence[Sample]) -> str | None:
    """KV bytes a token and what is added to them, from points that differ in the context alone.

    The number's slope along the context is the KV cache; the rest is workspace, which differs between libraries. ``None``
    where the number is not a straight line.
    """
    parts = []
    short = short_tags(list(dict.fromkeys(sample.tag for sample in samples)))
    for tag in short:
        line = _line([sample for sample in samples if sample.tag == tag])
        if line is None:
            return None
        slope, offset = line
        parts.append(f"{short[tag]} {slope * 2**20:,.0f} bytes a token + {offset:.1f} MB".replace(",", " "))
    if not parts:
        return None
    return (
        f"Along the context the KVCache number is: {'; '.join(parts)}. The slope is the KV cache, the rest workspace."
    )


def _line(samples: Sequence[Sample]) -> tuple[float, float] | None:
    points = {key: spread.middle for key, spread in spreads(samples, "kvcache_mb").items()}
    found: dict[int, set[float]] = {}
    for (settings, _), value in points.items():
        found.setdefault(settings[0], set()).add(value)
    means = {context: median(values) for context, values in found.items()}
    if len(means) < 2:
        return None
    first, last = min(means), max(means)
    slope = (means[last] - means[first]) / (last - first)
    offset = means[first] - slope * first
    straight = all(abs(offset + slope * x - value) < 0.01 for x, values in found.items() for value in values)
    return (slope, offset) if straight else None


def cache_caption(samples: Sequence[Sample]) -> str | None:
    """How many blocks measured a request that the prefix cache served."""
    known = [sample for sample in samples if sample.condition.cached is not None]
    hits = sum(bool(sample.condition.cached) for sample in known)
    if not known:
        return "The files do not say whether prompts were computed or taken from a prefix cache."
    if not hits:
        return "All prompts were computed: no prefix-cache hit."
    return (
        f"In {hits} of {len(known)} blocks the last prompt came from the prefix cache but for its last tokens: their TTFT, "
        "latency and prefill numbers are not those of a prompt that is computed."
    )


def repeats_caption(samples: Sequence[Sample], quantity: str) -> str | None:
    """By how much repeats of one point differ where one machine in one state cannot be the reason."""
    worst: dict[str, float] = {}
    for tag in dict.fromkeys(sample.tag for sample in samples):
        found = spreads([sample for sample in samples if sample.tag == tag], quantity).values()
        worst[tag] = max((s.high / s.low for s in found if s.low > 0 and s.count > 1), default=1.0)
    short = short_tags(list(worst))
    mixed = [f"{short[tag]} {ratio:.2f} x" for tag, ratio in worst.items() if ratio > _ONE_MACHINE]
    if not mixed:
        return None
    return (
        f"Repeats of one point differ by up to: {', '.join(mixed)}. The files do not say which machine ran which row."
    )


def chars_caption(samples: Sequence[Sample]) -> str:
    """What characters a second are."""
    text = "Characters of streamed text / wall time of a run: no tokens, and the prefill is in it."
    if any(not sample.own for sample in samples):
        text += " The first run of a point computes its prompt, the others take it from the prefix cache."
    return text


def sheet_notes(sheet: CsvSheet) -> Iterable[str]:
    """What is odd about a file: repeated and missing points, failed ones, runs of two kinds."""
    yield from sheet.notes
    if not sheet.rows:
        yield f"{sheet.source}: only a header, nothing to draw"
        return
    failed = [row for row in sheet.rows if row["status"] not in (None, "ok")]
    for reason, count in Counter(row["reason"] or row["status"] for row in failed).items():
        yield f"{sheet.source}: {count} row{'s' if count > 1 else ''} without a result: {reason}"
    found: dict[tuple[object, ...], int] = {}
    rows = [row for row in sheet.rows if row not in failed]
    repeats = [block[0] for block in blocks(rows)] if sheet.table is METRICS else rows
    for row in repeats:
        key = tuple(row[name] for name in KEY)
        found[key] = found.get(key, 0) + 1
    runs = {key: int(str(key[KEY.index("num_runs")])) if sheet.table is RESULTS else 1 for key in found}
    repeated = sum(count > runs[key] for key, count in found.items())
    if repeated:
        yield f"{sheet.source}: {repeated} of {len(found)} points are there more than once: drawn as spread"
    short = sum(count % runs[key] > 0 for key, count in found.items())
    if short:
        yield f"{sheet.source}: {short} point{'s lack' if short > 1 else ' lacks'} runs"
    for name in ("num_runs", "max_tokens", "device"):
        values = sorted({key[KEY.index(name)] for key in found}, key=str)
        if len(values) > 1:
            yield f"{sheet.source}: rows of {name} {' and '.join(map(str, values))}; never pooled where a time is drawn"
    yield from _missing(sheet, repeats)


def _missing(sheet: CsvSheet, rows: Sequence[object]) -> Iterable[str]:
    present = {tuple(row[axis] for axis in AXES) for row in rows}  # type: ignore[index]
    values = [sorted({settings[place] for settings in present}) for place in range(len(AXES))]
    wanted = [point for point in _product(values) if _possible(point)]
    missing = [point for point in wanted if point not in present]
    if missing:
        named = "; ".join(
            ", ".join(f"{axis} {written(axis, value)}" for axis, value in zip(AXES, point, strict=True))
            for point in missing[:_NAMED]
        )
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        yield f"{sheet.source}: {len(missing)} of {len(wanted)} points have no row: {named}{more}"


def _product(values: Sequence[Sequence[int]]) -> Iterable[tuple[int, ...]]:
    from itertools import product

    return product(*values)


def _possible(point: tuple[int, ...]) -> bool:
    """The original's rules between axes."""
    context, chunk, _, window, sink = point
    return chunk <= context and (sink == 0 if window <= 0 else sink <= window // 8)
