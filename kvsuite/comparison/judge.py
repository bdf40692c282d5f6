"""The verdict on every metric of one case."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import geometric_mean, median

import msgspec

from .machine import machine_differences, setting_difference
from .matching import SideCase
from .noise import MAX_CV, MIN_ROUNDS, Machine, timed_change
from .records import MetricEntry, RecordRow
from .rules import Rule, Rules
from .sides import Side
from .tokens import paired_difference
from .verdicts import STATUS, Verdict, Word

_FAILED = ("oom", "error", "crashed")
# equal up to the order of floating-point sums, and to what an allocator rounds
_TOLERANCE = {"deterministic": 1e-9, "near_deterministic": 1e-4}
# metrics that are means over rows of a sidecar, and the column
_PAIRED = {
    "perplexity": "nll", "nll_sum": "nll", "next_token_acc": "correct", "retrieval_logprob": "nll",
    "retrieval_exact": "correct", "task_score": "correct",
}  # fmt: skip
# those whose rows are samples, each with the mean of its questions
_OF_SAMPLES = {"retrieval_logprob", "retrieval_exact", "task_score"}
_OWN_ERRORS = {"perplexity", *_OF_SAMPLES}
_SIGMAS = 2.0
_BUSY = 0.02


@dataclass(frozen=True)
class Pair:
    """One case on both sides."""

    base: SideCase
    now: SideCase


@dataclass(frozen=True)
class _JudgedCase:
    """What the verdicts of a case share: other settings of its times, and what its machine was like."""

    pair: Pair
    id: str
    settings: str | None
    machine: Machine


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
        """Verdicts on a case: its status if one side has no result, else all its metrics."""
        pair, note = _without_failed(pair)
        before, after = worst(pair.base), worst(pair.now)
        if before.status != "ok" or after.status != "ok":
            return [_status(before, after)]
        rules = self._rules.of_case(after.suite, (after.name, after.bracket, after.id))
        case = _JudgedCase(
            pair,
            after.id,
            self._other_machine or setting_difference(pair.base.all, pair.now.all),
            _machine(pair),
        )
        several = len(pair.base.rows) > 1 or len(pair.now.rows) > 1
        verdicts = [Verdict(after.id, STATUS, "1", None, None, "ok -> ok", "information", "", note)] if note else []
        names: Collection[str] = before.metrics
        if several or not before.metrics.keys() >= after.metrics.keys():
            # any run may be the only one that has a metric
            names = dict.fromkeys(name for row in (*pair.base.all, *pair.now.all) for name in row.metrics)
        for name in names:
            if several:
                old, new = _stand_in(pair.base, name, may_lack=True), _stand_in(pair.now, name)
            else:
                old, new = before.metrics.get(name), after.metrics.get(name)
            first = old or new
            if first is None or ((old is None or old.value is None) and (new is None or new.value is None)):
                continue
            rule = rules.find(name, first.unit, first.better, first.kind)
            verdicts.append(self._metric(case, name, old, new, rule))
        return verdicts

    def _metric(
        self, case: _JudgedCase, name: str, old: MetricEntry | None, new: MetricEntry | None, rule: Rule | None
    ) -> Verdict:
        first = old if old is not None else new
        assert first is not None
        base = None if old is None else old.value
        now = None if new is None else new.value
        change: float | None = None
        gate = "" if rule is None or math.isinf(rule.limit.amount) else rule.text

        def verdict(word: Word, note: str = "", lacked: float = 0.0, varied: float = 0.0) -> Verdict:
            return Verdict(case.id, name, first.unit, base, now, change, word, gate, note, lacked, varied)

        if old is None or base is None:
            return verdict("information", "the base has none")
        judged = first.better != "none" and first.kind != "ambient"
        if new is None or now is None:
            reason = "the record lacks it" if new is None or not new.reason else new.reason
            return verdict("regression" if judged else "information", f"lost: {reason}")
        change = now / base - 1 if base else None
        other = _other_definition(old, new)
        if other or not judged:
            return verdict("information", other or "")
        if first.kind == "timed":
            if case.settings or first.pooled:
                return verdict("information", case.settings or f"pooled over rounds ({first.pooled})")
            word, note, lacked, varied = self._timed(case, name, old, new, rule)
            return verdict(word, note, lacked, varied)
        if base == now:
            return verdict("same")
        worse_by = now - base if first.better == "lower" else base - now
        if abs(worse_by) <= _TOLERANCE[first.kind] * abs(base):
            return verdict("same")
        broken = rule is not None and rule.limit.exceeded(base, worse_by, first.kind)
        noise = _noise(name, case.pair, self._base, self._now) if name in _PAIRED else None
        if noise is not None and abs(worse_by) <= _SIGMAS * noise.error:
            note = f"inside 2 standard errors ({_SIGMAS * noise.error:.3g}, {noise.how})"
            return verdict("unstable" if broken else "same", note)
        word = "regression" if broken else "worse" if worse_by > 0 else "better"
        return verdict(word, "" if noise is None else f"more than 2 standard errors, {noise.how}")

    def _timed(
        self, case: _JudgedCase, name: str, old: MetricEntry, new: MetricEntry, rule: Rule | None
    ) -> tuple[Word, str, float, float]:
        """Verdict and reason; what of its speed the machine lacked, and how it varied, where they made the noise wider."""
        found = timed_change(_entries(case.pair.base, name), _entries(case.pair.now, name), self._family, case.machine)
        base = old.value or 0.0
        if found is None:
            return *_without_noise(base, new.value or 0.0, old, min(old.n or 1, new.n or 1), rule), 0.0, 0.0
        worse_by = found.change * base * (1 if old.better == "lower" else -1)
        broken = rule is not None and rule.limit.exceeded(base, worse_by, "timed")
        band = f"noise {_band_text(found.low, found.high)}"
        if not found.measured:
            band += ", assumed for so few processes"
        lacked, varied = max(case.machine.lacks), case.machine.varies
        machine = lacked if found.alone and lacked > _BUSY else 0.0, varied if found.alone and varied > MAX_CV else 0.0
        if found.real:
            return "regression" if broken else "worse" if worse_by > 0 else "better", f"outside {band}", *machine
        if broken:
            return "unstable", f"inside {band}", *machine
        if found.cv > MAX_CV:
            return "unstable", f"rounds vary by {found.cv:.0%}, {band}", *machine
        if found.alone and case.machine.noise > MAX_CV:
            return "unstable", band, *machine
        return "same", band, *machine


def _without_noise(base: float, now: float, old: MetricEntry, fewest: int, rule: Rule | None) -> tuple[Word, str]:
    """The verdict on times that have no logarithm or too few rounds."""
    if fewest < MIN_ROUNDS:
        return "unstable", f"{fewest} rounds, {MIN_ROUNDS} are needed"
    if base == now:
        return "same", ""
    worse_by = now - base if old.better == "lower" else base - now
    if rule is None or (rule.limit.relative and base == 0):
        # a share of nothing is nothing
        return "unstable", "0 has no noise"
    broken = rule.limit.exceeded(base, worse_by, "timed")
    return "regression" if broken else "unstable", "0 has no noise"


def _band_text(low: float, high: float) -> str:
    if high > 1:
        return f"x{1 + low:.2g} to x{1 + high:.3g}"
    return f"{low:+.1%} to {high:+.1%}" if high < 0.1 else f"{low:+.0%} to {high:+.0%}"


def _machine(pair: Pair) -> Machine:
    """What the probe and the account of waiting say about both sides."""
    waits, probes, varies = [0.0, 0.0], [0.0, 0.0], 0.0
    interpreters: set[str | None] = set()
    for index, side in enumerate((pair.base, pair.now)):
        for _, row in side.rows:
            share, probe = row.metrics.get("host_wait_share"), row.metrics.get("host_probe_s")
            if share is not None and share.value:
                waits[index] = min(max(waits[index], share.value), 1.0)
            if probe is not None and probe.value:
                probes[index] = max(probes[index], probe.value)
                varies = max(varies, probe.cv or 0.0)
                interpreters.add(probe.protocol)
    # probes of two interpreters are two probes
    if min(probes) > 0 and len(interpreters) == 1:
        waits = [1 - (1 - wait) * min(probes) / probe for wait, probe in zip(waits, probes, strict=True)]
    return Machine.of((waits[0], waits[1]), varies)


def _without_failed(pair: Pair) -> tuple[Pair, str]:
    """The pair with those runs of the base in which the case was fine, if there are any: one bad run makes no bad base."""
    fine = tuple((at, row) for at, row in pair.base.rows if row.status == "ok")
    failed = [row.status for row in pair.base.all if row.status != "ok"]
    if not fine or not failed:
        return pair, ""
    note = f"{len(failed)} of {len(pair.base.rows)} runs of the base are left out: {', '.join(sorted(set(failed)))}"
    return Pair(SideCase(fine), pair.now), note


def worst(case: SideCase) -> RecordRow:
    """The row that stands for a side: one that failed, where there is one."""
    return next((row for _, row in case.rows if row.status != "ok"), case.first)


def _status(before: RecordRow, after: RecordRow) -> Verdict:
    word: Word = "information"
    # what was ok and now is skipped has lost its numbers
    if before.status == "ok" or (after.status in _FAILED and before.status not in _FAILED):
        word = "regression"
    elif after.status == "ok" and before.status in _FAILED:
        word = "better"
    note = "" if after.status == "ok" else after.why
    return Verdict(after.id, STATUS, "1", None, None, f"{before.status} -> {after.status}", word, "", note)


def _entries(case: SideCase, name: str) -> list[MetricEntry]:
    entries = [row.metrics.get(name) for _, row in case.rows]
    return [entry for entry in entries if entry is not None and entry.value is not None]


def _stand_in(case: SideCase, name: str, *, may_lack: bool = False) -> MetricEntry | None:
    """One entry for all processes of a side: of times the geometric mean, which is what is judged, else the median.

    A metric that one of them lost is lost, unless they ``may_lack`` it: then those that have it are enough.
    """
    entries = [row.metrics.get(name) for _, row in case.rows]
    known = [entry for entry in entries if entry is not None]
    held = [entry for entry in known if entry.value is not None]
    if not known or (len(known) < len(entries) and not may_lack):
        return None
    if not held or (len(held) < len(known) and not may_lack):
        return next(entry for entry in known if entry.value is None)
    values = [entry.value for entry in held if entry.value is not None]
    timed = held[0].kind == "timed" and min(values) > 0
    fewest = min((entry.n for entry in held if entry.n is not None), default=None)
    return msgspec.structs.replace(held[0], value=geometric_mean(values) if timed else median(values), n=fewest)


def _other_definition(base: MetricEntry, now: MetricEntry) -> str | None:
    if (base.version, base.unit, base.better, base.kind, base.clock, base.protocol) == (
        now.version, now.unit, now.better, now.kind, now.clock, now.protocol,
    ):  # fmt: skip
        return None
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
    at_base, old = next((one for one in pair.base.rows if _value(one[1], name) is not None), pair.base.rows[0])
    at_now, new = pair.now.rows[0]
    paired = paired_difference(base.runs[at_base].tokens(old), now.runs[at_now].tokens(new), _PAIRED[name])
    unit = "sample" if name in _OF_SAMPLES else "token"
    if paired is not None:
        scale = {"perplexity": _value(old, name), "nll_sum": _value(old, "nll_tokens")}.get(name, 1.0)
        return None if scale is None else _Noise(paired[1] * scale, f"paired by {unit}")
    errors = [_own_error(name, row) for row in (old, new)]
    known = [error for error in errors if error is not None]
    return _Noise(math.hypot(*known), f"not paired: a side has no {unit} losses") if len(known) == 2 else None


def _own_error(name: str, row: RecordRow) -> float | None:
    """Standard error of a mean over tokens from its own record."""
    value, error, count = _value(row, name), _value(row, "perplexity_se"), _value(row, "nll_tokens")
    if name in _OWN_ERRORS or value is None or not count:
        return _value(row, f"{name}_se") if name in _OWN_ERRORS else None
    if name == "next_token_acc":
        return math.sqrt(max(value * (1 - value), 0.0) / count)
    perplexity = _value(row, "perplexity")
    return count * error / perplexity if error is not None and perplexity else None


def _value(row: RecordRow, name: str) -> float | None:
    entry = row.metrics.get(name)
    return None if entry is None else entry.value
