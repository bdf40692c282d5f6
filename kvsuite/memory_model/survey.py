"""A whole space predicted: what each point takes, whether it fits, and what to turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvsuite.errors import UserError

from .design_point import Broken
from .design_space import DesignSpace, SpacePoint
from .fit import Card, Mend, fits, mends
from .prediction import JSON_CHUNK, MIB, PARTS, Basis, Part, Prediction, Predictor

#: the rule that a weight format breaks which the engine does not have
FORMAT_OF_ENGINE = "format-of-engine"
_COLUMNS: dict[Part, str] = {"parameters": "params", "kv_cache": "kvcache", "temporary": "temp"}
_ORDER: tuple[Basis, ...] = ("unknown", "rough", "extrapolated", "fitted", "exact")


@dataclass(frozen=True)
class SurveyRow:
    """One point.

    Parameters
    ----------
    entry
        The point, which breaks no rule, and its flags.
    prediction
        Its memory.
    fits
        Whether it fits the card; ``None`` without one, or where that cannot be said.
    mends
        What makes it fit.
    """

    entry: SpacePoint
    prediction: Prediction
    fits: bool | None
    mends: tuple[Mend, ...]

    @property
    def advice(self) -> str:
        """What to turn, in words."""
        if self.fits is not False:
            return ""
        if self.prediction.needed is None:
            return "weights and cache alone are too large"
        return " or ".join(map(str, self.mends)) or "no setting is enough"


@dataclass(frozen=True)
class Survey:
    """The points of a space with their memory.

    Parameters
    ----------
    space, predictor, card
        What was asked.
    rows
        The valid points in order.
    """

    space: DesignSpace
    predictor: Predictor
    card: Card | None
    rows: tuple[SurveyRow, ...]


def survey(space: DesignSpace, predictor: Predictor, card: Card | None = None) -> Survey:
    """Predict every valid point of a space; those of a weight format that the engine does not have are not valid.

    Raises
    ------
    UserError
        If the engine has none of the weight formats.
    """
    space = _without_refused_formats(space, predictor)
    rows = [_row(entry, predictor, card) for entry in space.entries if not entry.broken]
    return Survey(space, predictor, card, tuple(rows))


def _without_refused_formats(space: DesignSpace, predictor: Predictor) -> DesignSpace:
    refused: dict[str, UserError] = {}
    firsts = {entry.point.quantization: entry.point for entry in reversed(space.entries)}
    for name, point in firsts.items():
        try:
            predictor.predict(point)
        except UserError as error:
            refused[name] = error
    if refused and len(refused) == len(firsts):
        raise refused[space.entries[0].point.quantization]
    entries = [
        replace(entry, broken=(*entry.broken, Broken(FORMAT_OF_ENGINE, str(refused[entry.point.quantization]))))
        if entry.point.quantization in refused
        else entry
        for entry in space.entries
    ]
    return replace(space, entries=tuple(entries))


def _row(entry: SpacePoint, predictor: Predictor, card: Card | None) -> SurveyRow:
    prediction = predictor.predict(entry.point)
    verdict = None if card is None else fits(prediction, card)
    found = tuple(mends(predictor, entry.point, card)) if card is not None and verdict is False else ()
    return SurveyRow(entry, prediction, verdict, found)


def csv_header() -> list[str]:
    """Columns of `csv_rows`."""
    return list(_cells_of_broken(None))


def csv_rows(found: Survey) -> list[dict[str, object]]:
    """Every point of the space as a row, those that break a rule without numbers."""
    by_point = {row.entry.point: row for row in found.rows}
    return [
        _cells(by_point[entry.point], found) if entry.point in by_point else _cells_of_broken(entry, found.predictor)
        for entry in found.space.entries
    ]


def _cells(row: SurveyRow, found: Survey) -> dict[str, object]:
    prediction = row.prediction
    cells = _cells_of_broken(row.entry, found.predictor)
    for part in PARTS:
        cells[f"mem_predicted_{_COLUMNS[part]}_mb"] = _mib(prediction.part(part))
        cells[f"{_COLUMNS[part]}_basis"] = weakest(prediction, part)
    cells["mem_predicted_total_mb"] = _mib(prediction.total)
    cells["mem_predicted_needed_mb"] = _mib(prediction.needed)
    if prediction.allocation is not None:
        cells["kv_blocks"] = prediction.allocation.blocks + prediction.allocation.extra
        cells["kv_allocated_bytes"] = prediction.allocation.bytes
        cells["kv_dtype"] = prediction.allocation.dtype
    cells["null_reason"] = "; ".join(prediction.reasons)
    cells["notes"] = "; ".join(prediction.notes)
    cells["fits"] = {True: "yes", False: "no", None: "" if found.card is None else "unknown"}[row.fits]
    cells["turn"] = row.advice
    return cells


def _cells_of_broken(entry: SpacePoint | None, predictor: Predictor | None = None) -> dict[str, object]:
    cells: dict[str, object] = dict.fromkeys(
        ["id", "engine", "model", "quantization", "context_window_size", "prefill_chunk_size", "max_batch_size",
         "sliding_window_size", "attention_sink_size", JSON_CHUNK,
         *(f"mem_predicted_{name}_mb" for name in (*_COLUMNS.values(), "total", "needed")),
         *(f"{name}_basis" for name in _COLUMNS.values()), "kv_blocks", "kv_allocated_bytes", "kv_dtype", "null_reason",
         "fits", "turn", "broken_rules", "flags", "inert_axes", "notes"],
        "",
    )  # fmt: skip
    if entry is None or predictor is None:
        return cells
    chunk = predictor.own_settings().get(JSON_CHUNK)
    return (
        cells
        | {"id": entry.point.id, "engine": predictor.engine, "model": predictor.architecture.label}
        | {"quantization": entry.point.quantization, **entry.point.settings()}
        | {JSON_CHUNK: "" if chunk is None else chunk}
        | {"broken_rules": "; ".join(map(str, entry.broken)), "flags": "; ".join(entry.flags)}
        | {"inert_axes": ",".join(predictor.inert())}
    )


def weakest(prediction: Prediction, *parts: Part) -> Basis:
    """The least certain basis of the terms of some parts, of all if none is named."""
    found = {term.basis for term in prediction.terms if not parts or term.part in parts}
    return next(basis for basis in _ORDER if basis in found)


def largest(rows: Sequence[SurveyRow]) -> SurveyRow:
    """The point that takes most, the first of several."""
    return max(rows, key=lambda row: row.prediction.needed_at_least)


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:.3f}"
