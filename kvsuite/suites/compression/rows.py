"""What the rows of the suite are to each other, by the fields of their cases: the full cache, controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvsuite.cache_formats.cache_format import AUTO
from kvsuite.cache_formats.chosen_format import PARAMETER, label_of
from kvsuite.meters.divergence import is_trap
from kvsuite.reporting.aggregate import Row, value

#: what stands before the number of a case that is a trap, and what it means
TRAP_MARK = "†"
TRAP_MEANING = f"{TRAP_MARK} trap: a better loss than the full cache's, but other most likely tokens: no improvement"

#: the policy that a method of the same cache size has to beat
CONTROL = "recent_only"


def is_baseline(row: Row) -> bool:
    """Whether the case is the full cache in the model's dtype, that the others are compared with."""
    return is_full(row) and format_name(row) == AUTO


def is_full(row: Row) -> bool:
    """Whether the case removes no tokens, in whatever number format it stores them."""
    return row["case"]["policy"] is None


def format_name(row: Row) -> str:
    """The number format of keys and values, ``auto`` for the model's dtype."""
    return label_of(str(row["case"]["params"].get(PARAMETER, AUTO)))


def has_formats(rows: Iterable[Row]) -> bool:
    """Whether any of the cases stores keys and values in a format other than the model's dtype."""
    return any(format_name(row) != AUTO for row in rows)


def is_trap_row(row: Row) -> bool:
    """Whether the case is a trap (`kvsuite.meters.divergence.is_trap`), as its record has it."""
    difference, same = value(row, "nll_difference"), value(row, "same_top1")
    return difference is not None and same is not None and is_trap(difference, same)


def baseline_for(row: Row, rows: Sequence[Row]) -> Row | None:
    """The baseline of the same engine, model, weights, dtype and kind of device, finished or not."""
    return next((other for other in rows if is_baseline(other) and setting(other) == setting(row)), None)


def setting(row: Row) -> tuple[str, ...]:
    """Device, engine, model, weights and dtype: what cases that are compared share."""
    case = row["case"]
    device = str(case["device"]).partition(":")[0]
    return (device, *(str(case[axis]) for axis in ("engine", "model", "quantization", "dtype")))
