"""A comparison: cases matched, every metric judged, what is missing, new or renamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .judge import Judge, Pair
from .machine import machine_differences
from .matching import Matcher, SideCase, cases_of_side
from .records import Row
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
        # most rows are neither, and there are a hundred thousand of them
        lines = [row.line for row in self.rows if row.verdict in _MAY_FAIL and fails(row, self.rules)]
        lines += [f"{case}: missing; rule missing" for case in self.missing if "missing" in self.rules.words]
        lines += [f"{case}: new, nothing to compare with; rule new" for case in self.new if "new" in self.rules.words]
        if "renamed" in self.rules.words:
            lines += [f"{after}: was {before}; rule renamed" for before, after in self.renamed]
        return lines

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


def fails(row: Verdict, rules: Rules) -> bool:
    """Whether a verdict makes its case fail."""
    if row.verdict == "regression":
        return bool(rules)
    return row.verdict == "unstable" and bool(row.rule) and "unstable" in rules.words


def compare(base: Side, now: Side, rules: Rules) -> Comparison:
    """Compare two sides."""
    before, after = cases_of_side(base), cases_of_side(now)
    matcher = Matcher(before, {case_id for _, case_id in after})
    pairs: list[tuple[SideCase, SideCase | None]] = [(case, matcher.take(case.first)) for case in after.values()]
    known = [Pair(old, case) for case, old in pairs if old is not None]
    judge = Judge(base, now, rules, family=gated_times(known, rules))
    result = Comparison(base, now, rules, notes=comparison_notes(base, now))
    for case, old in pairs:
        if old is None:
            result.new.append(case.first.id)
        else:
            add_pair(result, judge, Pair(old, case))
    result.missing = [case_id for _, case_id in matcher.left]
    result.notes += rules.about_nothing(case_names(pair.now.first) for pair in known)
    return result


def case_names(row: Row) -> tuple[str, tuple[str, str, str]]:
    """Suite and names of a case, as rules call it."""
    return row.suite, (row.name, row.bracket, row.id)


def add_pair(result: Comparison, judge: Judge, pair: Pair) -> list[Verdict]:
    """Judge one case and add what comes out."""
    verdicts = judge.case(pair)
    result.rows += verdicts
    result.compared += 1
    if pair.base.first.id != pair.now.first.id:
        result.renamed.append((pair.base.first.id, pair.now.first.id))
    return verdicts


def comparison_notes(base: Side, now: Side) -> list[str]:
    """What holds for all rows."""
    notes = [*base.notes, *now.notes]
    differences = machine_differences(base, now)
    if differences:
        notes.append(f"another machine, so times are information and no gate: {'; '.join(differences)}")
    return notes


def gated_times(cases: Iterable[Pair | SideCase], rules: Rules) -> int:
    """How many timed comparisons of these cases a rule gates: all of them together may raise one false alarm in a hundred."""
    count = 0
    for case in cases:
        row = case.base.first if isinstance(case, Pair) else case.first
        active = rules.of_case(*case_names(row))
        count += sum(
            entry.kind == "timed" and active.find(name, entry.unit, entry.better, entry.kind) is not None
            for name, entry in row.metrics.items()
        )
    return count


def select(cases: dict[tuple[str, str], SideCase], ids: Collection[str]) -> Sequence[SideCase]:
    """The cases of a side with these ids."""
    return [case for (_, case_id), case in cases.items() if case_id in ids]
