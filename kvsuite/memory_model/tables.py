"""A surveyed space as text: a table for each weight format, rules and flags in words, and where one point's memory goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from .design_point import AXES, OFF, DesignPoint
from .fit import Card
from .formats import ELEMENT_BYTES
from .prediction import MIB, PARTS, Part, Prediction, Predictor, Term
from .survey import Row, Survey, largest, weakest

MISSING = "n/a"
#: behind numbers that are not closed forms
MARKS = {"fitted": "f", "extrapolated": "x", "rough": "~", "exact": " ", "unknown": " "}
LEGEND = (
    "MB is MiB. Behind a number: f fitted to published libraries, x extrapolated beyond them, ~ a rough count; without a "
    "mark closed form."
)
_TITLES = (
    ("context", 8), ("chunk", 6), ("batch", 5), ("window", 12), ("sinks", 14), ("points", 6), ("KV cache", 11),
    ("temporary", 11), ("total", 11), ("blocks", 7), ("stored", 10), ("needed", 11),
)  # fmt: skip


def survey_text(found: Survey) -> str:
    """The whole answer as text."""
    parts = [*_heading(found), *_rules(found)]
    for name, rows in groupby(found.rows, key=lambda row: row.entry.point.quantization):
        parts += ["", *_format_table(name, list(rows), found)]
    if found.rows:
        parts += ["", *breakdown(largest(found.rows), found, what="the point that takes most")]
    return "\n".join(parts) + "\n"


def _heading(found: Survey) -> Iterator[str]:
    model, predictor = found.predictor.architecture, found.predictor
    weights = ", random weights" if model.is_dummy else ""
    trained = f", trained for {model.trained_length:,} positions" if model.trained_length else ""
    yield (
        f"{model.label}{weights}: {model.layers} layers, {model.kv_heads} of {model.query_heads} heads with keys and values "
        f"of {model.head_dim}, vocabulary {model.vocabulary:,}{trained}"
    )
    yield predictor.described()
    if found.card is not None:
        share = f"{found.card.bytes / 2**30:g} GiB, of which the engine uses {found.card.share:g}"
        yield f"card: {share}: {found.card.usable / MIB:,.0f} MB"
    yield LEGEND
    for reason, names in _by_reason(predictor.inert()):
        yield f"inert here: {', '.join(names)}: {reason}"


def _rules(found: Survey) -> Iterator[str]:
    broken = found.space.invalid
    counted = f"{len(found.rows)} points" + (f", {len(broken)} more break a rule" if broken else "")
    yield f"space {found.space.name}: {counted}"
    first: dict[str, tuple[str, str]] = {}
    counts: Counter[str] = Counter()
    for entry in broken:
        for one in entry.broken:
            counts[one.rule] += 1
            first.setdefault(one.rule, (one.reason, entry.point.id))
    for rule, (reason, name) in first.items():
        yield f"  {counts[rule]} break {rule}: {reason} ({name}{' and others' if counts[rule] > 1 else ''})"
    flags = Counter(flag for row in found.rows for flag in row.entry.flags)
    for flag, count in flags.items():
        yield f"  {count} flagged: {flag}"


def _format_table(name: str, rows: Sequence[Row], found: Survey) -> Iterator[str]:
    first = rows[0].prediction
    parameters = first.part("parameters")
    yield f"{name}: parameters {_mb(parameters)} MB" + _kv_line(first, found.predictor)
    for reason in dict.fromkeys(reason for row in rows for reason in row.prediction.reasons):
        yield f"  {MISSING}: {reason}"
    said = ("inert", "share the pages")
    notes = (note for row in rows for note in row.prediction.notes)
    for note in dict.fromkeys(note for note in notes if not any(word in note for word in said)):
        yield f"  note: {note}"
    titles = " ".join(f"{title:>{width}}" for title, width in _TITLES)
    yield titles + ("  fits" if found.card else "")
    for _, of_context in groupby(rows, key=lambda row: row.entry.point.context_window_size):
        yield "-" * len(titles)
        for same in _merged(list(of_context)):
            yield _line(same, found.card)


def _kv_line(first: Prediction, predictor: Predictor) -> str:
    model = predictor.architecture
    stored = ""
    if first.allocation is not None:
        size = model.kv_bytes_per_token(ELEMENT_BYTES[first.allocation.dtype])
        stored = f"; a token's keys and values {size / 1024:g} KiB in {first.allocation.dtype}"
    return stored + predictor.kv_notes(first.point)


def _merged(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of one context, those together that differ in window and sinks only and say the same."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        point, numbers = row.entry.point, row.prediction
        key = (
            point.prefill_chunk_size, point.max_batch_size, *map(numbers.part, PARTS), numbers.needed, numbers.allocation,
            row.fits, row.advice,
        )  # fmt: skip
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def _line(same: list[Row], card: Card | None) -> str:
    point, numbers = same[0].entry.point, same[0].prediction
    allocation = numbers.allocation
    cells = [
        str(point.context_window_size),
        str(point.prefill_chunk_size),
        str(point.max_batch_size),
        _values(row.entry.point.sliding_window_size for row in same),
        _values(row.entry.point.attention_sink_size for row in same),
        str(len(same)),
        _marked(numbers, "kv_cache"),
        _marked(numbers, "temporary"),
        _mb(numbers.total) + _mark(numbers),
        MISSING if allocation is None else str(allocation.blocks + allocation.extra),
        MISSING if allocation is None else f"{allocation.bytes / MIB:.1f}",
        _mb(numbers.needed) + _mark(numbers),
    ]
    line = " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _TITLES, strict=True))
    if card is None:
        return line.rstrip()
    verdict = {True: "yes", False: "no", None: "unknown"}[same[0].fits]
    return f"{line}  {verdict}" + (f"; {same[0].advice}" if same[0].advice else "")


def breakdown(row: Row, found: Survey, *, what: str = "") -> Iterator[str]:
    """Where the memory of a point goes: each term, what moves it, and its formula."""
    prediction = row.prediction
    known = sum(term.bytes for term in prediction.terms if term.bytes is not None)
    yield f"{row.entry.point.id}{f', {what}' if what else ''}:"
    yield f"{'part':<11} {'for':<25} {'MB':>11} {'share':>6}  {'moved by':<42} formula"
    for term in prediction.terms:
        share = "" if term.bytes is None or not known else f"{term.bytes / known:.1%}"
        moved = _moved_by(term, found.predictor)
        mark = MARKS[term.basis]
        yield f"{term.part:<11} {term.name:<25} {_mb(term.bytes) + mark:>11} {share:>6}  {moved:<42} {term.formula}"
    if prediction.allocation is not None:
        allocation = prediction.allocation
        yield (
            f"stored: ({allocation.blocks} + {allocation.extra}) blocks of {allocation.block_bytes:,} bytes in "
            f"{allocation.dtype}: {_mb(allocation.bytes)} MB"
        )
    if found.card is not None:
        room = found.predictor.capacity(row.entry.point, found.card.usable)
        if room is not None:
            yield f"by the engine's own estimate the card has room for {max(room, 0):,} tokens with the other settings"


def _moved_by(term: Term, predictor: Predictor) -> str:
    axes = {axis.name: axis.short[0] for axis in AXES}
    inert = predictor.inert()
    names = [axes.get(name, name) for name in term.settings if name not in inert]
    return ", ".join(names) or "nothing"


def _values(values: Iterable[int]) -> str:
    found = list(dict.fromkeys("off" if value == OFF else str(value) for value in values))
    return ",".join(found) if len(",".join(found)) <= 12 else f"{found[0]}..{found[-1]}"


def _by_reason(reasons: dict[str, str]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return list(found.items())


def _marked(prediction: Prediction, part: Part) -> str:
    return _mb(prediction.part(part)) + MARKS[weakest(prediction, part)]


def _mark(prediction: Prediction) -> str:
    return MARKS[weakest(prediction)]


def _mb(size: float | None) -> str:
    return MISSING if size is None else f"{size / MIB:.3f}"


def find_row(rows: Sequence[Row], point: DesignPoint) -> Row | None:
    """The row of a point, ``None`` if the space does not have it."""
    return next((row for row in rows if row.entry.point == point), None)
