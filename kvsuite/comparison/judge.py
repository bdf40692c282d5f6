"""The verdict on every metric of one case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from .machine import machine_differences, setting_difference
from .matching import SideCase
from .noise import MAX_CV, MIN_ROUNDS, timed_change
from .records import Entry, Row
from .rules import Rule, Rules
from .sides import Side
from .tokens import paired_difference
from .verdicts import STATUS, Verdict, Word

_FAILED = ("oom", "error", "crashed")
# equal up to the order of floating-point sums, and to what an allocator rounds
_TOLERANCE = {"deterministic": 1e-9, "near_deterministic": 1e-4}
# metrics that are means over tokens: the sidecar's column, and the metric of their own standard error
_PAIRED = {"perplexity": "nll", "nll_sum": "nll", "next_token_acc": "correct"}
_SIGMAS = 2.0
_BUSY = 0.02


class _MakeVerdict(Protocol):
    def __call__(self, word: Word, note: str = "", change: float | None = None) -> Verdict: ...


@dataclass(frozen=True)
class Pair:
    """One case on both sides."""

    base: SideCase
    now: SideCase


class Judge:
    """Judges the cases of a comparison one by one.

    Parameters
    ----------
    base, now
        The sides.
    rules
        What is gated.
    family
        Timed comparisons that are gated together.
    """

    def __init__(self, base: Side, now: Side, rules: Rules, family: int) -> None:
        self._base, self._now, self._rules, self._family = base, now, rules, family
        self._other_machine = "another machine" if machine_differences(base, now) else None

    def case(self, pair: Pair) -> list[Verdict]:
        """Verdicts on a case: its status if that changed for the worse or better, else all its metrics."""
        before, after = (worst(side) for side in (pair.base, pair.now))
        if before.status != "ok" or after.status != "ok":
            return [_status(before, after)]
        rules = self._rules.of_case(after.suite, {after.name, after.bracket, after.id})
        settings = self._other_machine or setting_difference(pair.base.all, pair.now.all)
        olds, news = ([row.metrics for _, row in side.rows] for side in (pair.base, pair.now))
        verdicts = []
        for name in {**before.metrics, **after.metrics}:
            old, new = ([metrics.get(name) for metrics in side] for side in (olds, news))
            entries = [entry for entry in (*old, *new) if entry is not None]
            rule = rules.find(name, entries[0].unit, entries[0].better, entries[0].kind)
            verdict = self._metric(name, pair, old, new, rule, settings)
            if verdict is not None:
                verdicts.append(verdict)
        return verdicts

    def _metric(
        self,
        name: str,
        pair: Pair,
        old: Sequence[Entry | None],
        new: Sequence[Entry | None],
        rule: Rule | None,
        settings: str | None,
    ) -> Verdict | None:
        before, after = _known(old), _known(new)
        if before is None and after is None:
            return None
        first = (before or after or [])[0]
        values = [None if side is None else _middle(side) for side in (before, after)]

        def verdict(word: Word, note: str = "", change: float | None = None) -> Verdict:
            text = "" if rule is None or math.isinf(rule.limit.amount) else rule.text
            return Verdict(pair.now.first.id, name, first.unit, values[0], values[1], change, word, text, note)

        if before is None:
            return verdict("information", "the base has none")
        judged = first.better != "none" and first.kind != "ambient"
        if after is None:
            reason = next((entry.reason for entry in new if entry is not None and entry.reason), "the record lacks it")
            return verdict("regression" if judged else "information", f"lost: {reason}")
        base, now = _middle(before), _middle(after)
        change = now / base - 1 if base else None
        other = _other_definition(before[0], after[0])
        if other or not judged:
            return verdict("information", other or "", change)
        worse_by = now - base if first.better == "lower" else base - now
        if first.kind == "timed":
            if settings or first.pooled:
                return verdict("information", settings or f"pooled over rounds ({first.pooled})", change)
            waits = (_wait(pair.base), _wait(pair.now))
            return self._timed(verdict, before, after, rule, change, waits)
        broken = rule is not None and rule.limit.exceeded(base, worse_by, first.kind)
        if abs(worse_by) <= _TOLERANCE[first.kind] * abs(base):
            return verdict("same", "", change)
        noise = _noise(name, pair, self._base, self._now) if name in _PAIRED else None
        if noise is not None and abs(worse_by) <= _SIGMAS * noise.error:
            note = f"inside 2 standard errors ({_SIGMAS * noise.error:.3g}, {noise.how})"
            return verdict("unstable" if broken else "same", note, change)
        word: Word = "regression" if broken else "worse" if worse_by > 0 else "better"
        return verdict(word, "" if noise is None else f"more than 2 standard errors, {noise.how}", change)

    def _timed(
        self,
        verdict: _MakeVerdict,
        old: Sequence[Entry],
        new: Sequence[Entry],
        rule: Rule | None,
        change: float | None,
        waits: tuple[float, float],
    ) -> Verdict:
        found = timed_change(old, new, self._family, waits)
        if found is None:
            fewest = min(entry.n or 1 for entry in (*old, *new))
            few = f"{fewest} rounds, {MIN_ROUNDS} are needed" if fewest < MIN_ROUNDS else "a time of 0 or less"
            return verdict("unstable", few, change)
        base = _middle(old)
        worse_by = found.change * base * (1 if old[0].better == "lower" else -1)
        broken = rule is not None and rule.limit.exceeded(base, worse_by, "timed")
        band = f"noise {_percent(found.low)} to {_percent(found.high)}"
        if not found.measured:
            band += ", assumed for so few processes"
            if max(waits) > _BUSY:
                band += f" that waited {max(waits):.0%} of the time for a CPU"
        if found.real:
            word: Word = "regression" if broken else "worse" if worse_by > 0 else "better"
            return verdict(word, f"outside {band}", found.change)
        if broken:
            return verdict("unstable", f"inside {band}", found.change)
        if found.cv is not None and found.cv > MAX_CV:
            return verdict("unstable", f"rounds vary by {found.cv:.0%}, {band}", found.change)
        return verdict("same", band, found.change)


def _percent(change: float) -> str:
    return f"{change:+.1%}" if abs(change) < 0.1 else f"{change:+.0%}"


def _wait(case: SideCase) -> float:
    """Largest share of time in which a process of a side waited for a CPU; 0 where that is not known."""
    shares = [_value(row, "host_wait_share") or 0.0 for row in case.all]
    return min(max(*shares, 0.0), 1.0)


def worst(case: SideCase) -> Row:
    """The row that stands for a side: one that failed, where there is one."""
    return next((row for _, row in case.rows if row.status != "ok"), case.first)


def _status(before: Row, after: Row) -> Verdict:
    word: Word = "information"
    # what was ok and now is skipped has lost its numbers
    if before.status == "ok" or (after.status in _FAILED and before.status not in _FAILED):
        word = "regression"
    elif after.status == "ok" and before.status in _FAILED:
        word = "better"
    note = "" if after.status == "ok" else after.why
    return Verdict(after.id, STATUS, "1", None, None, f"{before.status} -> {after.status}", word, "", note)


def _known(entries: Sequence[Entry | None]) -> list[Entry] | None:
    """The entries of all processes of a side; a metric that one of them lost is lost."""
    known = [entry for entry in entries if entry is not None and entry.value is not None]
    return known if len(known) == len(entries) else None


def _middle(entries: Sequence[Entry]) -> float:
    if len(entries) == 1:
        return entries[0].value or 0.0
    return median(entry.value or 0.0 for entry in entries)


def _other_definition(base: Entry, now: Entry) -> str | None:
    for name in ("version", "unit", "better", "kind", "clock", "protocol"):
        before, after = getattr(base, name), getattr(now, name)
        if before != after:
            return f"another {name}: {before} -> {after}"
    return None


@dataclass(frozen=True)
class _Noise:
    """Standard error of a difference, in the metric's unit, and where it comes from."""

    error: float
    how: str


def _noise(name: str, pair: Pair, base: Side, now: Side) -> _Noise | None:
    """Standard error of the difference of a mean over tokens: paired where both sides have the tokens.

    Perplexity's is that of the mean difference of the losses times the base (delta method). Without tokens the two standard
    errors are added as if the sides had scored different texts, which is far too wide, and the note says so.
    """
    (at_base, old), (at_now, new) = pair.base.rows[0], pair.now.rows[0]
    paired = paired_difference(base.runs[at_base].tokens(old), now.runs[at_now].tokens(new), _PAIRED[name])
    if paired is not None:
        scale = {"perplexity": _value(old, name), "nll_sum": _value(old, "nll_tokens")}.get(name, 1.0)
        return None if scale is None else _Noise(paired[1] * scale, "paired by token")
    errors = [_own_error(name, row) for row in (old, new)]
    known = [error for error in errors if error is not None]
    return _Noise(math.hypot(*known), "not paired: a side has no token losses") if len(known) == 2 else None


def _own_error(name: str, row: Row) -> float | None:
    """Standard error of a mean over tokens from its own record."""
    value, error, count = _value(row, name), _value(row, "perplexity_se"), _value(row, "nll_tokens")
    if name == "perplexity" or value is None or not count:
        return error if name == "perplexity" else None
    if name == "next_token_acc":
        return math.sqrt(max(value * (1 - value), 0.0) / count)
    perplexity = _value(row, "perplexity")
    return count * error / perplexity if error is not None and perplexity else None


def _value(row: Row, name: str) -> float | None:
    entry = row.metrics.get(name)
    return None if entry is None else entry.value
