"""A surveyed space for the console: a table for each weight format, rules and flags, and where one point's memory goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from kvsuite.console import Column, Sheet, stacked
from kvsuite.models.layers import Layer

from .cache_room import TEXT_TOKENS, CacheRoom
from .config import Architecture
from .design_point import AXES, OFF, DesignPoint
from .fit import Card
from .formats import ELEMENT_BYTES
from .prediction import MIB, PARTS, Part, Prediction, Predictor, Term
from .survey import Survey, SurveyRow, largest, weakest

if TYPE_CHECKING:
    from rich.console import RenderableType

MISSING = "n/a"
#: behind numbers that are not closed forms
MARKS = {"fitted": "f", "extrapolated": "x", "rough": "~", "exact": "", "unknown": ""}
LEGEND = (
    "MB is MiB. Behind a number: f fitted to published libraries, x extrapolated beyond them, ~ a rough count; without a "
    "mark closed form."
)
_CONTEXT = ("context", 8)
_COLUMNS = (
    Column("chunk", 6), Column("batch", 5), Column("window", 12), Column("sinks", 14), Column("points", 6),
    Column("KV cache", 11), Column("temporary", 11), Column("total", 11), Column("blocks", 7), Column("stored", 10),
    Column("needed", 11),
)  # fmt: skip
_FITS = Column("fits", justify="left")
_TERM_COLUMNS = (
    Column("for", 25, "left"), Column("MB", 11), Column("share", 6), Column("moved by", 42, "left"),
    Column("formula", justify="left"),
)  # fmt: skip


def survey_tables(found: Survey) -> RenderableType:
    """The whole answer."""
    formats = groupby(found.rows, key=lambda row: row.entry.point.quantization)
    parts = [_format_table(name, list(rows), found) for name, rows in formats]
    if found.rows:
        parts.append(breakdown(largest(found.rows), found, what="the point that takes most"))
    return stacked([*_heading(found), *_rules(found)], *parts)


def _heading(found: Survey) -> Iterator[str]:
    model, predictor = found.predictor.architecture, found.predictor
    weights = ", random weights" if model.is_dummy else ""
    trained = f", trained for {model.trained_length:,} positions" if model.trained_length else ""
    yield (f"{model.label}{weights}: {model.layers} layers, {_stored(model)}, vocabulary {model.vocabulary:,}{trained}")
    yield predictor.described()
    if found.card is not None:
        share = f"{found.card.bytes / 2**30:g} GiB, of which the engine uses {found.card.share:g}"
        yield f"card: {share}: {found.card.usable / MIB:,.0f} MB"
    yield LEGEND
    for reason, names in _by_reason(predictor.inert()):
        yield f"inert here: {', '.join(names)}: {reason}"


def _stored(model: Architecture) -> str:
    """What the layers store, in words."""
    if isinstance(model.cache, str):
        return f"keys and values {MISSING}"
    shape = model.shape
    if shape is not None and model.window is None and shape.attention == "full":
        return f"{shape.kv_heads} of {model.query_heads} heads with keys and values of {shape.key_dim}"
    kinds = Counter(replace(layer, index=0, rotary=False) for layer in model.cache.layers)
    shown = ", ".join(f"{count} {_kind(layer, model)}" for layer, count in kinds.items())
    return f"{shown}: {model.kv_bytes_per_token(2) / 1024:g} KiB a token in transformers' cache in 16 bits"


def _kind(layer: Layer, model: Architecture) -> str:
    if layer.attention is None:
        return f"{layer.what} (no keys and values)"
    seen = "" if layer.window is None else f" of {layer.window:,}"
    if layer.latent:
        return f"{layer.what}{seen} (latents of {layer.key_dim} + {layer.value_dim})"
    width = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim} and {layer.value_dim}"
    return f"{layer.what}{seen} ({layer.kv_heads} of {model.query_heads} heads with keys and values of {width})"


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


def _format_table(name: str, rows: Sequence[SurveyRow], found: Survey) -> list[RenderableType]:
    first = rows[0].prediction
    parameters = first.part("parameters")
    shown: list[RenderableType] = [f"{name}: parameters {_mb(parameters)} MB" + _kv_line(first, found.predictor)]
    reasons = dict.fromkeys(reason for row in rows for reason in row.prediction.reasons)
    shown += [f"  {MISSING}: {reason}" for reason in reasons]
    said = ("inert", "share the pages")
    notes = (note for row in rows for note in row.prediction.notes)
    told = dict.fromkeys(note for note in notes if not any(word in note for word in said))
    shown += [f"  note: {note}" for note in told]
    lines: list[tuple[str, list[str]] | None] = []
    for context, of_context in groupby(rows, key=lambda row: row.entry.point.context_window_size):
        lines.append(None)
        lines += [(str(context), _cells(same, found.card)) for same in _merged(list(of_context))]
    columns = [*_COLUMNS, _FITS] if found.card else _COLUMNS
    title, width = _CONTEXT
    shown.append(Sheet(title, columns, lines, width, label_justify="right", ruled=False))
    return shown


def _kv_line(first: Prediction, predictor: Predictor) -> str:
    model = predictor.architecture
    stored = ""
    if first.allocation is not None:
        size = model.kv_bytes_per_token(ELEMENT_BYTES[first.allocation.dtype])
        stored = f"; a token's keys and values {size / 1024:g} KiB in {first.allocation.dtype}"
    return stored + predictor.kv_notes(first.point)


def _merged(rows: list[SurveyRow]) -> Iterator[list[SurveyRow]]:
    """Rows of one context, those together that differ in window and sinks only and say the same."""
    groups: dict[tuple[object, ...], list[SurveyRow]] = {}
    for row in rows:
        point, numbers = row.entry.point, row.prediction
        key = (
            point.prefill_chunk_size, point.max_batch_size, *map(numbers.part, PARTS), numbers.needed, numbers.allocation,
            row.fits, row.advice,
        )  # fmt: skip
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def _cells(same: list[SurveyRow], card: Card | None) -> list[str]:
    point, numbers = same[0].entry.point, same[0].prediction
    allocation = numbers.allocation
    cells = [
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
    if card is None:
        return cells
    verdict = {True: "yes", False: "no", None: "unknown"}[same[0].fits]
    return [*cells, f"{verdict}{f'; {same[0].advice}' if same[0].advice else ''}"]


def breakdown(row: SurveyRow, found: Survey, *, what: str = "") -> list[RenderableType]:
    """Where the memory of a point goes: each term, what moves it, and its formula."""
    prediction = row.prediction
    known = sum(term.bytes for term in prediction.terms if term.bytes is not None)
    terms = []
    for term in prediction.terms:
        share = "" if term.bytes is None or not known else f"{term.bytes / known:.1%}"
        moved = _moved_by(term, found.predictor)
        terms.append((term.part, [term.name, _mb(term.bytes) + MARKS[term.basis], share, moved, term.formula]))
    shown: list[RenderableType] = [
        f"{row.entry.point.id}{f', {what}' if what else ''}:",
        Sheet("part", _TERM_COLUMNS, terms, 11, ruled=False),
    ]
    if prediction.allocation is not None:
        allocation = prediction.allocation
        shown.append(
            f"stored: ({allocation.blocks} + {allocation.extra}) blocks of {allocation.block_bytes:,} bytes in "
            f"{allocation.dtype}: {_mb(allocation.bytes)} MB"
        )
    if found.card is not None:
        room = found.predictor.capacity(row.entry.point, found.card.usable)
        if room is not None:
            shown.append(
                f"by the engine's own estimate the card has room for {max(room, 0):,} tokens with the other settings"
            )
    return shown


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


def cache_room_table(
    rooms: Sequence[CacheRoom],
    quantization: str,
    element_bytes: int,
    free_bytes: float | None,
    notes: Sequence[str] = (),
) -> RenderableType:
    """What each cache format takes, and how long a text may be whose cache stands beside the weights alone.

    ``notes`` stand above the table.
    """
    shown: list[RenderableType] = [
        f"cache formats; auto is {8 * element_bytes} bits, and a token's bytes are the mean of a text of {TEXT_TOKENS:,}"
        + (
            ""
            if free_bytes is None
            else f"; {quantization} weights leave {free_bytes / MIB:,.0f} MB for keys and values alone"
        )
    ]
    shown += [f"  {note}" for note in notes]
    shown += [f"  {room.name} {MISSING}: {room.reason}" for room in rooms if room.reason]
    columns = [Column("KiB a token", 12), *([] if free_bytes is None else [Column("tokens", 14)])]
    lines: list[tuple[str, list[str]] | None] = []
    for room in rooms:
        cells = [MISSING if room.token_bytes is None else f"{room.token_bytes / 1024:.3f}"]
        if free_bytes is not None:
            cells.append(MISSING if room.tokens is None else f"{room.tokens:,}")
        lines.append((room.name, cells))
    shown.append(Sheet("format", columns, lines, 40))
    return stacked(shown)


def find_row(rows: Sequence[SurveyRow], point: DesignPoint) -> SurveyRow | None:
    """The row of a point, ``None`` if the space does not have it."""
    return next((row for row in rows if row.entry.point == point), None)
