"""What the table, the figure and the original's files all need to know about rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.metrics.registry import ALIASES
from kvsuite.record import metric_value
from kvsuite.store.files import utf8

Row = Mapping[str, Any]

#: characters of the message of an error in a table
_MOST_OF_AN_ERROR = 300
NOT_IN_RECORD = "not in the record"
GIB = 1024**3
MIB = 1024**2


def json_bytes(document: Mapping[str, Any], where: str) -> bytes:
    """A document as it stands in a file: indented, UTF-8.

    Raises
    ------
    UserError
        If it holds NaN or an infinity.
    """
    import msgspec

    try:
        # Python's own indentation is slow, and msgspec would write null for NaN
        packed = utf8(json.dumps(document, allow_nan=False, ensure_ascii=False))
        return msgspec.json.format(packed, indent=2) + b"\n"
    except msgspec.DecodeError:  # a file name that is not UTF-8, which Python holds as half of a pair
        return utf8(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    except ValueError as error:
        raise UserError(f"{where}: holds NaN or an infinity ({error}); write null with a reason instead") from error


def in_space_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows into the order of their suite's space; they ran in a rotated one."""
    return sorted(rows, key=lambda row: (row["suite"], row.get("case_index", 0)))


def suite_rows(rows: Sequence[Row], suite: str) -> list[Row]:
    """Rows of one suite, in run order.

    Raises
    ------
    UserError
        If there is none.
    """
    selected = [row for row in rows if row["suite"] == suite]
    if not selected:
        raise UserError(f"no {suite} case among the {len(rows)} records; run benchmarks/test_{suite}.py first")
    return selected


def by_name(rows: Sequence[Row], write: Callable[[object], str] = visible) -> dict[str, Row]:
    """Rows by the label that tables and figures show, in run order.

    The label is the case's name. Where several rows share it (two engines, say) it is the bracket of the pytest id,
    and the whole id where even that is shared: two cases never become one series. ``write`` makes text of it: one line for a
    terminal or a figure, ``str`` where what reads the labels shows any text safely.
    """
    names = [write(row["case"]["name"]) for row in rows]
    brackets = [write(str(row["id"]).partition("[")[2].removesuffix("]") or row["id"]) for row in rows]
    name_counts, bracket_counts = Counter(names), Counter(brackets)
    labels: dict[str, Row] = {}
    for row, name, bracket in zip(rows, names, brackets, strict=True):
        label = name if name_counts[name] == 1 else bracket if bracket_counts[bracket] == 1 else write(row["id"])
        labels[label] = row
    return labels


def entry(row: Row, metric: str) -> Mapping[str, Any]:
    """The record's entry of a metric by name or alias; empty where the record has none."""
    found: Mapping[str, Any] = row["metrics"].get(ALIASES.get(metric, metric)) or {}
    return found


def value(row: Row, metric: str) -> float | None:
    """Headline value of a metric of a finished case; a case that failed has no numbers to show."""
    return metric_value(dict(row), metric) if row["status"] == "ok" else None


def ci_half_width(row: Row, metric: str) -> float | None:
    """Half the 95 % interval of the mean, in the metric's unit; ``None`` below two samples."""
    interval = entry(row, metric).get("ci95")
    return None if interval is None else (interval[1] - interval[0]) / 2


def missing_reason(row: Row, metric: str) -> str:
    """Why a finished case has no value of ``metric``."""
    reason = entry(row, metric).get("reason")
    if reason:
        return str(reason)
    if metric in _PER_WORD and row["case"]["workload"].get("protocol") != _PER_WORD_PROTOCOL:
        return f"only {_PER_WORD_PROTOCOL} has them"
    if "speed" in row["inert"] and metric not in row["metrics"]:
        return str(row["inert"]["speed"])
    return "random weights" if row["model"].get("kind") == "dummy" and metric in _QUALITY else NOT_IN_RECORD


_PER_WORD, _PER_WORD_PROTOCOL = frozenset({"word_perplexity", "byte_perplexity", "bits_per_byte"}), "lm-eval-rolling"
_QUALITY = frozenset({"perplexity", "perplexity_se", "next_token_acc", "ppl_ratio", "ppl_ratio_se"})


def failure(row: Row) -> str:
    """One line that says how a case without numbers ended: its status and its reason, whole, for its mend stands at its end.

    Of a long message of an error the middle is left out.
    """
    error = row.get("error") or {}
    text = row.get("reason") or ": ".join(str(error[key]) for key in ("type", "message") if error.get(key))
    text = " ".join(str(text).split())
    if not row.get("reason"):
        text = visible(text, _MOST_OF_AN_ERROR)
    return f"{row['status']}: {text}" if text else str(row["status"])


def change(new: float | None, base: float | None) -> float | None:
    """``new / base - 1``, ``None`` where either is missing or the base is 0."""
    return None if new is None or not base else new / base - 1
