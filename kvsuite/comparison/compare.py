"""A comparison: cases matched, every metric judged, what is missing, new or renamed; fed at once or case by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .judge import Judge, Pair
from .machine import machine_differences
from .matching import Matcher, SideCase, cases_of_side
from .records import RecordRow
from .rules import Rules
from .sides import Side
from .verdicts import Verdict

SCHEMA = "kvsuite.comparison/1"
_MAY_FAIL = ("regression", "unstable")


@dataclass
class Comparison:
    """What came out.

    Parameters
    ----------
    base, now
        The sides.
    rules
        What was gated; nothing fails without.
    rows
        A verdict for every metric of every case that both sides have, and one for every change of status.
    missing, new
        Ids of cases that one side lacks; renamed ones, which both have, are apart.
    renamed
        (id in base, id in now).
    compared
        Cases that both sides have.
    notes
        What a reader must know: other machines, cut off files.
    """

    base: Side
    now: Side
    rules: Rules
    rows: list[Verdict] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    compared: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by verdict, those that occur."""
        return dict(Counter(row.verdict for row in self.rows))

    @property
    def failures(self) -> list[str]:
        """One line for everything that the rules make fail, the rule included; empty without rules."""
        if not self.rules:
            return []
        return [
            *_lines_of_verdicts(self.rows, self.rules),
            *(line for case in self.missing for line in missing_lines(case, self.rules)),
            *(line for case in self.new for line in _new_lines(case, self.rules)),
            *(line for before, after in self.renamed for line in _renamed_lines(before, after, self.rules)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types: ``comparison.json``."""
        return {
            "schema": SCHEMA,
            "base": {"label": self.base.label, "run": self.base.run_id},
            "now": {"label": self.now.label, "run": self.now.run_id},
            "compared": self.compared,
            "counts": self.counts,
            "rows": [row.to_dict() for row in self.rows],
            "missing": self.missing,
            "new": self.new,
            "renamed": [{"base": before, "now": after} for before, after in self.renamed],
            "notes": self.notes,
            "failures": self.failures,
        }


def missing_lines(case: str, rules: Rules) -> list[str]:
    """A line if the rules make a case fail that the base alone has."""
    return [f"{case}: missing, the base has it; rule missing"] if "missing" in rules.words else []


def _new_lines(case: str, rules: Rules) -> list[str]:
    return [f"{case}: new, nothing to compare with; rule new"] if "new" in rules.words else []


def _renamed_lines(before: str, after: str, rules: Rules) -> list[str]:
    return [f"{after}: was {before}; rule renamed"] if "renamed" in rules.words else []


def _lines_of_verdicts(verdicts: Iterable[Verdict], rules: Rules) -> list[str]:
    # most verdicts are neither, and there are a hundred thousand of them
    return [one.line for one in verdicts if one.verdict in _MAY_FAIL and _fails(one, rules)]


def _fails(verdict: Verdict, rules: Rules) -> bool:
    if verdict.verdict == "regression":
        return bool(rules)
    return verdict.verdict == "unstable" and bool(verdict.rule) and "unstable" in rules.words


@dataclass
class _Judged:
    """A case of now: its first row, what it is in the base, and the verdicts."""

    row: RecordRow
    base: SideCase | None
    verdicts: list[Verdict] = field(default_factory=list)


class ComparisonBuilder:
    """Compares cases with a base, all at once or one by one as they end.

    Parameters
    ----------
    base
        What they are compared with.
    rules
        What is gated.
    ids
        Ids of all cases of now, those to come included: a case that has kept its name is matched with no other.
    """

    def __init__(self, base: Side, rules: Rules, ids: Collection[str]) -> None:
        self.base, self.rules = base, rules
        cases = cases_of_side(base)
        self._matcher = Matcher(cases, ids)
        self._judged: dict[Hashable, _Judged] = {}
        # before the cases of now are known, those of the base stand for them
        self._family = self._timed(case.first for (_, case_id), case in cases.items() if case_id in ids)
        self._judge: tuple[Side, Judge] | None = None
        self._notes: list[str] = []

    @property
    def left(self) -> list[RecordRow]:
        """The first row of each case of the base that no case of now was."""
        return [case.first for case in self._matcher.left.values()]

    def compare_all(self, now: Side) -> None:
        """Judge every case of a whole side; the gated times of those that have a base are one family."""
        cases = cases_of_side(now)
        for place, case in cases.items():
            self._match(place, case.first)
        self._family = self._timed(one.row for one in self._judged.values() if one.base is not None)
        for place, case in cases.items():
            self.add(place, now, case)

    def add(self, place: Hashable, now: Side, case: SideCase) -> list[str]:
        """Judge a case of ``now``.

        Parameters
        ----------
        place
            Names the case among those of now; one that comes again takes the place of what it was before.
        now
            The side that it is of.
        case
            The case.

        Returns
        -------
        list of str
            A line for everything that the rules make fail.
        """
        judged = self._match(place, case.first)
        judged.row = case.first
        if judged.base is None:
            return _new_lines(judged.row.id, self.rules)
        judged.verdicts = self._judge_of(now).case(Pair(judged.base, case))
        lines = _lines_of_verdicts(judged.verdicts, self.rules)
        before = judged.base.first.id
        return lines + (_renamed_lines(before, judged.row.id, self.rules) if before != judged.row.id else [])

    def result(self, now: Side, missing: Sequence[str]) -> Comparison:
        """The comparison of what was added; ``missing`` are ids of the base's cases that should have come."""
        compared = [(one.row, one.base.first) for one in self._judged.values() if one.base is not None]
        return Comparison(
            self.base,
            now,
            self.rules,
            rows=[verdict for one in self._judged.values() for verdict in one.verdicts],
            missing=list(missing),
            new=[one.row.id for one in self._judged.values() if one.base is None],
            renamed=[(old.id, new.id) for new, old in compared if old.id != new.id],
            compared=len(compared),
            notes=self._notes + (self.rules.about_nothing(_names(new) for new, _ in compared) if compared else []),
        )

    def _match(self, place: Hashable, row: RecordRow) -> _Judged:
        if place not in self._judged:
            self._judged[place] = _Judged(row, self._matcher.take(row))
        return self._judged[place]

    def _judge_of(self, now: Side) -> Judge:
        if self._judge is None or self._judge[0] is not now:
            self._judge = now, Judge(self.base, now, self.rules, self._family)
            self._notes += [note for note in _notes(self.base, now) if note not in self._notes]
        return self._judge[1]

    def _timed(self, rows: Iterable[RecordRow]) -> int:
        """How many timed comparisons a rule gates: all of them together may raise one false alarm in a hundred."""
        count = 0
        for row in rows:
            active = self.rules.of_case(*_names(row))
            count += sum(
                entry.kind == "timed" and active.find(name, entry.unit, entry.better, entry.kind) is not None
                for name, entry in row.metrics.items()
            )
        return count


def compare(base: Side, now: Side, rules: Rules) -> Comparison:
    """Compare two sides."""
    builder = ComparisonBuilder(base, rules, {row.id for run in now.runs for row in run.rows})
    builder.compare_all(now)
    return builder.result(now, [row.id for row in builder.left])


def _notes(base: Side, now: Side) -> list[str]:
    """What holds for all rows."""
    notes = [*base.notes, *now.notes]
    differences = machine_differences(base, now)
    if differences:
        notes.append(f"another machine, so times are information and no gate: {'; '.join(differences)}")
    return notes


def _names(row: RecordRow) -> tuple[str, tuple[str, str, str]]:
    """Suite and names of a case, as rules call it."""
    return row.suite, (row.name, row.bracket, row.id)
