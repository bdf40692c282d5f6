"""What the page's script knows about the cases: columns of cells, and the details of each case, every text once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvsuite.reporting.aggregate import NOT_IN_RECORD, Row, by_name, ci_half_width, failure, missing_reason
from kvsuite.reporting.machines import machine_of
from kvsuite.store.inside import inside

from .columns import MACHINE, PageColumn, identity_columns

_DETAILS = (
    "case_key",
    "settings_hash",
    "started_utc",
    "duration_s",
    "rounds",
    "warmup",
    "seed",
    "order_index",
    "reason",
)
_PARTS = ("warnings", "error", "inert", "effective", "tokens", "memory", "model", "dataset", "partition")
_DIGITS = 9


class Pool:
    """Every distinct value once, named by its index: ten thousand cases say most things alike."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def add(self, value: Any) -> int:
        """Index of ``value``, which is JSON."""
        key = json.dumps(value, sort_keys=True)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def case_data(folder: Path, rows: Sequence[Row], metrics: Sequence[PageColumn]) -> dict[str, Any]:
    """The case table as JSON types.

    Parameters
    ----------
    folder
        Where the page will lie: of sidecars only those in it are linked.
    rows
        Record rows in the order of the suites' spaces, which is that of ``report.json``.
    metrics
        Their `metric_columns`.

    Returns
    -------
    dict
        ``columns``; ``cells``, ``spread`` (half the 95 % interval of the mean as a share of it) and ``missing`` (index of the
        reason in ``pool``) by column; ``names``, ``status``, ``failure``, ``details``, ``links`` by case; ``plot``; ``pool``.
    """
    pool = Pool()
    identity = identity_columns(rows)
    cells: dict[str, list[Any]] = {column.key: [_identity(row, column.key) for row in rows] for column in identity}
    spread: dict[str, list[float | None] | None] = {}
    missing: dict[str, dict[int, int]] = {}
    for column in metrics:
        name = column.key
        cells[name] = [_rounded(_entry(row, name).get("value")) for row in rows]
        spreads = [_spread(row, name) for row in rows]
        spread[name] = spreads if any(found is not None for found in spreads) else None
        missing[name] = {
            place: pool.add(missing_reason(row, name))
            for place, row in enumerate(rows)
            if row["status"] == "ok" and cells[name][place] is None and _is_expected(row, name)
        }
    return {
        "columns": [column.to_dict() for column in (*identity, *metrics)],
        "cells": cells,
        "spread": spread,
        "missing": missing,
        "names": list(by_name(rows, str)),
        "status": [row["status"] for row in rows],
        "failure": [None if row["status"] == "ok" else pool.add(failure(row)) for row in rows],
        "details": [{label: pool.add(value) for label, value in _details(row)} for row in rows],
        "links": [_sidecar(folder, row) for row in rows],
        "plot": _plot(rows, metrics),
        "pool": pool.values,
    }


def unmeasured(rows: Sequence[Row], columns: Iterable[PageColumn]) -> list[tuple[str, list[str]]]:
    """Metrics without a single number, by the reasons of the finished cases."""
    found: dict[tuple[str, ...], list[str]] = {}
    finished = [row for row in rows if row["status"] == "ok"]
    for column in columns:
        entries = [_entry(row, column.key) for row in finished]
        if any(entries) and all(entry.get("value") is None for entry in entries):
            reasons = dict.fromkeys(str(entry.get("reason")) for entry in entries if entry)
            found.setdefault(tuple(reasons), []).append(column.title)
    return [("; ".join(reasons), titles) for reasons, titles in found.items()]


def _entry(row: Row, name: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = row["metrics"].get(name) or {}
    return entry


def _is_expected(row: Row, name: str) -> bool:
    """Whether the lack of a value is worth a reason: a suite leaves out what it does not define."""
    return bool(_entry(row, name)) or missing_reason(row, name) != NOT_IN_RECORD


def _identity(row: Row, key: str) -> Any:
    if key == MACHINE:
        return machine_of(row) or None
    axis = key.partition("params.")[2]
    value = row["case"]["params"].get(axis) if axis else row["case"].get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else _text(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None if value is None else json.dumps(value, ensure_ascii=False)


def _rounded(value: Any) -> float | int | None:
    # the page shows up to six digits; report.json beside it has them all
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _spread(row: Row, name: str) -> float | None:
    half, mean = ci_half_width(row, name), _entry(row, name).get("mean")
    return None if half is None or not mean else float(f"{abs(half / mean):.3g}")


def _details(row: Row) -> Iterable[tuple[str, Any]]:
    yield "id", row["id"]
    yield "policy_params", row["case"]["policy_params"]
    yield "workload", row["case"]["workload"]
    yield "params", row["case"]["params"]
    for field in (*_DETAILS, *_PARTS):
        if row.get(field) not in (None, "", [], {}):
            yield field, row[field]


def _sidecar(folder: Path, row: Row) -> dict[str, str] | None:
    """Name of the raw data of a case and the link to it, only to a file inside the run's folder."""
    name = row.get("sidecar")
    if not isinstance(name, str):
        return None
    try:
        path = inside(folder, name)
    except ValueError:
        return None
    return {"name": name, "href": f"./{quote(path.relative_to(folder).as_posix())}"} if path.is_file() else None


def _plot(rows: Sequence[Row], metrics: Sequence[PageColumn]) -> dict[str, Any]:
    """Cases whose numbers may stand in one plot: one suite, model, kind of device, machine, protocol and data set."""
    groups = Pool()
    places = [groups.add(_group(row)) if row["status"] == "ok" else None for row in rows]
    return {
        "groups": groups.values,
        "group": places,
        "axes": [column.key for column in metrics if column.better in ("lower", "higher") and column.group != "other"],
    }


def _group(row: Row) -> str:
    case, workload = row["case"], row["case"]["workload"]
    parts = [row["suite"], case["model"], str(case["device"]).partition(":")[0], workload.get("protocol")]
    parts.append((row.get("dataset") or {}).get("name"))
    parts.append(machine_of(row))
    return " · ".join(str(part) for part in parts if part)
