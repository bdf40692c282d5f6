"""What the rows of the suite are to each other, by the fields of their cases: the full cache, controls."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.reporting.aggregate import Row

#: the policy that a method of the same cache size has to beat
CONTROL = "recent_only"


def is_baseline(row: Row) -> bool:
    """Whether the case is the full cache that the others are compared with."""
    return row["case"]["policy"] is None


def baseline_for(row: Row, rows: Sequence[Row]) -> Row | None:
    """The baseline of the same engine, model, weights, dtype and kind of device, finished or not."""
    return next((other for other in rows if is_baseline(other) and _setting(other) == _setting(row)), None)


def _setting(row: Row) -> tuple[str, ...]:
    case = row["case"]
    device = str(case["device"]).partition(":")[0]
    return (device, *(str(case[axis]) for axis in ("engine", "model", "quantization", "dtype")))
