"""What the rows of the suite are to each other, by the fields of their cases: the full cache, controls, methods of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsuite.reporting.aggregate import Row

#: the policy that a method of the same cache size has to beat
CONTROL = "recent_only"
# parameters of a policy whose sum is the size of its cache, where its case names no budget
_SIZES = (("window",), ("size",), ("start_size", "recent_size"))


def is_baseline(row: Row) -> bool:
    """Whether the case is the full cache that the others are compared with."""
    return row["case"]["policy"] is None


def baseline_for(row: Row, rows: Sequence[Row]) -> Row | None:
    """The baseline of the same engine, model, weights, dtype and kind of device, finished or not."""
    return next((other for other in rows if is_baseline(other) and _setting(other) == _setting(row)), None)


def paired(labelled: Mapping[str, Row]) -> dict[str, Row]:
    """Move each control in front of the first method of the same cache size."""
    order = list(labelled)
    for control in [name for name in order if _is_control(labelled[name])]:
        size = _size(labelled[control])
        partners = [name for name in order if not _is_control(labelled[name]) and _size(labelled[name]) == size]
        if size is not None and partners:
            order.remove(control)
            order.insert(order.index(partners[0]), control)
    return {name: labelled[name] for name in order}


def _is_control(row: Row) -> bool:
    return bool(row["case"]["policy"] == CONTROL)


def _size(row: Row) -> int | None:
    case = row["case"]
    budget = case["params"].get("budget")
    if budget is not None:
        return int(budget)
    parameters = case["policy_params"]
    found = [[parameters[name] for name in names] for names in _SIZES if all(name in parameters for name in names)]
    return sum(map(int, found[0])) if found else None


def _setting(row: Row) -> tuple[str, ...]:
    case = row["case"]
    device = str(case["device"]).partition(":")[0]
    return (device, *(str(case[axis]) for axis in ("engine", "model", "quantization", "dtype")))
