"""Which case of one side is which of the other: by key, whatever it is called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .records import RecordRow
from .sides import Side


@dataclass(frozen=True)
class SideCase:
    """One case on one side: its row in each run that has it, as (index of the run, row)."""

    rows: tuple[tuple[int, RecordRow], ...]

    @property
    def first(self) -> RecordRow:
        """Its row in the first run that has it."""
        return self.rows[0][1]

    @property
    def all(self) -> list[RecordRow]:
        """Its rows in all runs."""
        return [row for _, row in self.rows]


def cases_of_side(side: Side) -> dict[tuple[str, str], SideCase]:
    """Cases by key and id, in the order of the side's records."""
    found: dict[tuple[str, str], list[tuple[int, RecordRow]]] = {}
    for index, run in enumerate(side.runs):
        for row in run.rows:
            found.setdefault((row.case_key, row.id), []).append((index, row))
    return {key: SideCase(tuple(rows)) for key, rows in found.items()}


class Matcher:
    """Hands out the base's case of a case of now, each at most once; ``left`` are those that nobody asked for.

    Parameters
    ----------
    base
        Cases of the base by key and id.
    now_ids
        Ids that the other side has: a case that has kept its name is never matched with a renamed one.
    """

    def __init__(self, base: dict[tuple[str, str], SideCase], now_ids: Collection[str]) -> None:
        self.left = dict(base)
        self._now_ids = frozenset(now_ids)
        self._by_key: dict[str, list[tuple[str, str]]] = {}
        self._by_id: dict[str, list[tuple[str, str]]] = {}
        for place in base:
            self._by_key.setdefault(place[0], []).append(place)
            self._by_id.setdefault(place[1], []).append(place)

    def take(self, row: RecordRow) -> SideCase | None:
        """The base's case that ``row`` is, ``None`` for a new one."""
        place = (row.case_key, row.id)
        if place in self.left:
            return self.left.pop(place)
        for place in self._by_key.get(row.case_key, ()):
            if place in self.left and place[1] not in self._now_ids:
                return self.left.pop(place)
        for place in self._by_id.get(row.id, ()):
            # what failed before model or text were known has a key without their revisions
            if place in self.left and self._same_without_revisions(self.left[place].first, row):
                return self.left.pop(place)
        return None

    @staticmethod
    def _same_without_revisions(base: RecordRow, now: RecordRow) -> bool:
        return "ok" in (base.status, now.status) and base.status != now.status and base.identity == now.identity
