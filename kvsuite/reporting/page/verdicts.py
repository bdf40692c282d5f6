"""The verdicts that a comparison left in ``comparison.json`` of the run's folder, as the page shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.store.files import parse_json

COMPARISON_FILE = "comparison.json"
#: the worst first: what a reader of the page has to see
VERDICTS = ("regression", "unstable", "worse", "information", "better", "same")
_FIELDS = ("case", "metric", "unit", "base", "now", "change", "verdict", "rule", "note")


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """The comparison that lies in ``folder``, ``None`` where there is none.

    Raises
    ------
    UserError
        If the file is there and is none.
    """
    path = folder / COMPARISON_FILE
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a comparison ({error}); compare again, or remove it") from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("verdict"), str) for row in rows
    ):
        raise UserError(f"{path}: is no comparison (no rows with verdicts); compare again, or remove it")
    return dict(found)


def comparison_data(found: Mapping[str, Any]) -> dict[str, Any]:
    """The table of verdicts as JSON types, a list for each field, the worst first."""
    rows = sorted(found["rows"], key=lambda row: _rank(row["verdict"]))
    return {field: [row.get(field) for row in rows] for field in _FIELDS}


def verdict_counts(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    """How many rows got each verdict, the worst first."""
    counts = Counter(row["verdict"] for row in found["rows"])
    return [(verdict, counts[verdict]) for verdict in sorted(counts, key=_rank)]


def side(found: Mapping[str, Any], name: str) -> str:
    """What a side of the comparison is called: its label and its run."""
    about = found.get(name)
    if not isinstance(about, Mapping):
        return name
    parts = [str(about[key]) for key in ("label", "run") if about.get(key)]
    return " · ".join(dict.fromkeys(parts)) or name


def lines(found: Mapping[str, Any], name: str) -> list[str]:
    """Ids of the missing or the new cases, the renamed ones with both, or notes."""
    listed = found.get(name)
    return [_line(one) for one in listed] if isinstance(listed, list) else []


def _line(one: Any) -> str:
    return f"{one.get('base')} → {one.get('now')}" if isinstance(one, Mapping) else str(one)


def _rank(verdict: str) -> int:
    return VERDICTS.index(verdict) if verdict in VERDICTS else -1
