"""Do neighbours disturb? A case that was measured beside other workers, against its own record without any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvsuite.record import RECORD_SCHEMA

#: difference of a decode step from which on a record says so
BOUND = 0.02
# what a decode step takes, the purer one first
_STEPS = ("decode_step_s", "tpot_s")


class AloneTimes:
    """Decode steps of cases that were measured without neighbours, out of the runs that it has seen."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, str], tuple[float, str]] = {}

    def seen(self, runs: Iterable[tuple[str, list[dict[str, Any]]]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The same runs, noted as they pass: whoever reads them reads them for this one too.

        Parameters
        ----------
        runs
            Name and lines of each, oldest first (`kvsuite.distribution.recorded.last_runs`).
        """
        for run, lines in runs:
            self._note(run, lines)
            yield run, lines

    def warning(self, row: Mapping[str, Any]) -> str | None:
        """By how much the steps of a row differ from those of the same case alone, measured in the same way on this machine.

        ``None`` for a row without neighbours, within `BOUND`, or where nothing tells.
        """
        workers, step = _workers(row), _step(row)
        if workers < 2 or step is None or row["status"] != "ok":
            return None
        name, seconds = step
        alone = self._steps.get((_key(row), name))
        if alone is None or abs(seconds / alone[0] - 1) <= BOUND:
            return None
        change = seconds / alone[0] - 1
        return (
            f"{name} is {abs(change):.1%} {'above' if change > 0 else 'below'} that of {alone[1]}, where the case was measured "
            f"alone: {workers - 1} neighbour(s) may have disturbed it"
        )

    def _note(self, run: str, lines: Iterable[Mapping[str, Any]]) -> None:
        for row in lines:
            if row.get("schema") != RECORD_SCHEMA or row.get("status") != "ok" or _workers(row) != 1:
                continue
            step = _step(row)
            if step is not None and step[1] > 0:
                self._steps[_key(row), step[0]] = step[1], run


def _key(row: Mapping[str, Any]) -> str:
    # how it was measured has the kind of machine, the packages and the code in it; a node of a cluster is one of several
    effective = row.get("effective")
    node = effective.get("node") if isinstance(effective, Mapping) else None
    place = [node.get("name"), node.get("ip")] if isinstance(node, Mapping) else None
    return f"{row.get('case_key')} {row.get('settings_hash')} {place}"


def _workers(row: Mapping[str, Any]) -> int:
    effective = row.get("effective")
    workers = effective.get("concurrent_workers") if isinstance(effective, Mapping) else None
    return workers if isinstance(workers, int) else 0


def _step(row: Mapping[str, Any]) -> tuple[str, float] | None:
    metrics = row.get("metrics")
    for name in _STEPS:
        metric = metrics.get(name) if isinstance(metrics, Mapping) else None
        value = metric.get("value") if isinstance(metric, Mapping) else None
        if isinstance(value, int | float):
            return name, float(value)
    return None
