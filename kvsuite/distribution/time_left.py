"""How long a run will still take: what is expected of its cases, corrected by those that have finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.case import Case
from kvsuite.suites.footprint import Footprint
from kvsuite.survival.resume import planned_key

#: what is known of a case's speed, the most general first: cases of one kind are wrong in one way
Kind = tuple[str, ...]
# expected seconds from which on measured cases say more than the kind above them
_TRUST_S = 5.0


def kind_of(case: Case) -> Kind:
    """Device, engine, weight format and suite."""
    return case.device_kind, case.engine, case.quantization or "none", case.suite


@dataclass(frozen=True)
class Planned:
    """One case of a plan.

    Parameters
    ----------
    case
        The case.
    seconds
        Expected, ``None`` where nothing tells.
    source
        Where they come from: the run that measured the case on this machine, or ``model``, with how many measured cases
        corrected it.
    memory
        Predicted.
    """

    case: Case
    seconds: float | None
    source: str
    memory: Footprint


class Correction:
    """How many times longer cases take than expected, learnt from measured ones.

    The factor of a kind is that of its own cases, drawn towards that of the more general kind by as much as `_TRUST_S` seconds
    weigh; without any case it is 1.
    """

    def __init__(self) -> None:
        self._sums: dict[Kind, tuple[float, float]] = {}
        self.cases = 0

    def add(self, kind: Kind, expected: float, took: float) -> None:
        """A case of ``kind`` took so many seconds."""
        self.cases += 1
        for length in range(len(kind) + 1):
            all_taken, all_expected = self._sums.get(kind[:length], (0.0, 0.0))
            self._sums[kind[:length]] = all_taken + took, all_expected + expected

    def factor(self, kind: Kind) -> float:
        """What the expected seconds of a case of ``kind`` are multiplied by."""
        found = 1.0
        for length in range(len(kind) + 1):
            took, expected = self._sums.get(kind[:length], (0.0, 0.0))
            found = (took + _TRUST_S * found) / (expected + _TRUST_S)
        return found


class TimeLeft:
    """Seconds that a run still takes.

    Parameters
    ----------
    planned
        Its cases with what is expected of them.
    workers
        How many run at the same time.
    """

    def __init__(self, planned: Sequence[Planned], workers: int = 1) -> None:
        self._open = {planned_key(each.case.to_dict()): each for each in planned}
        #: may change while the run goes on
        self.workers = workers
        self._correction = Correction()
        self._took: list[float] = []

    def finished(self, row: Mapping[str, Any]) -> None:
        """The case of a record row has ended; what did not run to its end teaches nothing."""
        planned = self._open.pop(planned_key(row["case"]), None)
        took = row.get("duration_s")
        if row["status"] != "ok" or not isinstance(took, int | float):
            return
        self._took.append(took)
        if planned is not None and planned.seconds is not None:
            self._correction.add(kind_of(planned.case), planned.seconds, took)

    @property
    def seconds(self) -> float | None:
        """Of the cases that have not ended; ``None`` where nothing tells."""
        known = [each for each in self._open.values() if each.seconds is not None]
        unknown = len(self._open) - len(known)
        if unknown and not self._took:
            return None
        total = sum((each.seconds or 0.0) * self._correction.factor(kind_of(each.case)) for each in known)
        if unknown:
            total += unknown * sum(self._took) / len(self._took)
        return total / min(self.workers, max(len(self._open), 1))
