"""Rules of a gate: ``peak_vram:+2%,compression/streaming_*/ttft:+10%,missing``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from kvsuite.errors import UserError
from kvsuite.metrics.registry import ALIASES, BUILTIN, Better, Metric, MetricClass, metric_of

from .limits import Limit, parse_limit
from .sides import Side

#: what can fail beside metrics
WORDS = ("missing", "new", "renamed", "unstable")
_GLOB = frozenset("*?[")
_SIGNS: dict[Better, str] = {"lower": "+", "higher": "-", "none": ""}


class Known(NamedTuple):
    """What a rule must know of a metric."""

    unit: str
    better: Better
    kind: MetricClass
    #: what the word ``default`` stands for
    limit: str = ""

    @classmethod
    def of(cls, metric: Metric) -> Known:
        """What is known of a metric that is defined here."""
        return cls(metric.unit, metric.better, metric.metric_class, metric.limit)


@dataclass(frozen=True)
class Rule:
    """One limit for the metrics and cases that its patterns match; an empty ``case`` or ``suite`` matches all."""

    text: str
    suite: str
    case: str
    metric: str
    limit: Limit

    def covers(self, suite: str, names: Iterable[str]) -> bool:
        """Whether the rule is about a case of ``suite`` that is called ``names``."""
        return (not self.suite or fnmatchcase(suite, self.suite)) and (
            # a whole id has brackets, which a pattern would take for a set of characters
            not self.case or any(name == self.case or fnmatchcase(name, self.case) for name in names)
        )

    def fits(self, name: str, metric: Known) -> bool:
        """Whether the rule gates this metric: facts without a direction and ambient numbers are never gated."""
        if metric.better == "none" or metric.kind == "ambient" or self.limit.unit not in (None, metric.unit):
            return False
        return fnmatchcase(name, self.metric) and self.limit.sign in ("", _SIGNS[metric.better])


class CaseRules:
    """The rules that are about one case; cases that the same rules are about share one."""

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self._rules = rules
        self._found: dict[tuple[str, str, Better, MetricClass], Rule | None] = {}

    def find(self, name: str, unit: str, better: Better, kind: MetricClass) -> Rule | None:
        """The rule that gates a metric, if any."""
        key = (name, unit, better, kind)
        if key not in self._found:
            metric = Known(unit, better, kind)
            self._found[key] = next((rule for rule in reversed(self._rules) if rule.fits(name, metric)), None)
        return self._found[key]


class Rules:
    """Rules in the order written: of those that match, the last one counts."""

    def __init__(self, rules: Iterable[Rule] = (), words: Iterable[str] = ()) -> None:
        self.rules = tuple(rules)
        self.words = frozenset(words)
        self._cases: dict[tuple[int, ...], CaseRules] = {}
        # rules about every case need not be asked of each
        self._everywhere = None if any(rule.suite or rule.case for rule in self.rules) else CaseRules(self.rules)

    def __bool__(self) -> bool:
        return bool(self.rules or self.words)

    def of_case(self, suite: str, names: Iterable[str]) -> CaseRules:
        """The rules that are about a case, which has several ``names``."""
        if self._everywhere is not None:
            return self._everywhere
        active = tuple(index for index, rule in enumerate(self.rules) if rule.covers(suite, names))
        if active not in self._cases:
            self._cases[active] = CaseRules(tuple(self.rules[index] for index in active))
        return self._cases[active]

    def about_nothing(self, cases: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
        """A note for every rule whose case pattern matches none of these cases, given as (suite, names)."""
        left = {rule.text: rule for rule in self.rules if rule.case}
        for suite, names in cases if left else ():
            left = {text: rule for text, rule in left.items() if not rule.covers(suite, names)}
        return [f"rule {text} is about no case that was compared" for text in left]

    def check(self, known: Mapping[str, Known], suites: Iterable[str], option: str, *, complete: bool = True) -> None:
        """Refuse rules about metrics and suites that do not exist, and limits that can never be reached.

        Parameters
        ----------
        known, suites
            What there is.
        option
            For messages.
        complete
            Whether that is all there is; else rules about others are let through, unless they look misspelt.

        Raises
        ------
        UserError
            Naming the option, the rule and what was probably meant.
        """
        for rule in self.rules:
            try:
                if complete or _is_misspelt(rule.suite, suites):
                    _check_suite(rule, sorted(set(suites)))
                if complete or rule.metric in known or _is_misspelt(rule.metric, [*known, *ALIASES]):
                    _check_metric(rule, known)
            except ValueError as error:
                raise UserError(f"{option}={rule.text}: {error}") from error


def known_metrics(*sides: Side, more: Iterable[Metric] = ()) -> dict[str, Known]:
    """Metrics that rules may name: kvsuite's, ``more``, and those of the records."""
    known = {metric.name: Known.of(metric) for metric in BUILTIN} | {metric.name: Known.of(metric) for metric in more}
    for side in sides:
        for run in side.runs:
            for row in run.rows:
                for name in row.metrics.keys() - known.keys():
                    entry = row.metrics[name]
                    known[name] = Known(entry.unit, entry.better, entry.kind, entry.limit)
    return known


def default_rules(known: Mapping[str, Known] | None = None) -> list[str]:
    """Gates of the commands, and of the word ``default``: the limits of kvsuite's metrics, and of others that are known."""
    shorter = {name: alias for alias, name in ALIASES.items()}
    limits = known_metrics() if known is None else known
    return [f"{shorter.get(name, name)}:{metric.limit}" for name, metric in limits.items() if metric.limit]


def parse_rules(text: str, known: Mapping[str, Known] | None = None) -> Rules:
    """Parse rules without asking whether their metrics exist; `Rules.check` does. ``known`` is for `default_rules`.

    Raises
    ------
    ValueError
        Saying what is wrong with which rule.
    """
    rules: list[Rule] = []
    words: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part in WORDS:
            words.append(part)
        elif part == "default":
            rules += map(_parse_rule, default_rules(known))
        elif part:
            rules.append(_parse_rule(part))
    if not rules and not words:
        raise ValueError("is empty")
    return Rules(rules, words)


def _parse_rule(text: str) -> Rule:
    scope, colon, limit = text.rpartition(":")
    if not colon:
        meant = difflib.get_close_matches(text, [*WORDS, "default"], 1)
        hint = f"; did you mean {meant[0]}?" if meant else ""
        raise ValueError(f"{text} is no rule{hint}; write METRIC:LIMIT or one of {', '.join(WORDS)}")
    parts = scope.split("/")
    if not all(part.strip() for part in parts):
        raise ValueError(f"{scope or 'nothing'} is no scope; write METRIC, SUITE/METRIC or SUITE/CASE/METRIC")
    metric = parts[-1].strip()
    suite = parts[0].strip() if len(parts) > 1 else ""
    # a whole id has a path in it
    case = "/".join(parts[1:-1]).strip()
    return Rule(text, suite, case, ALIASES.get(metric, metric), parse_limit(limit.strip()))


def _check_suite(rule: Rule, suites: list[str]) -> None:
    if rule.suite and not any(fnmatchcase(suite, rule.suite) for suite in suites):
        raise ValueError(f"no suite {rule.suite}{_meant(rule.suite, suites)}; there are {', '.join(suites)}")


def _check_metric(rule: Rule, known: Mapping[str, Known]) -> None:
    if _GLOB & set(rule.metric):
        if not any(rule.fits(name, metric) for name, metric in known.items()):
            raise ValueError(f"no metric that {rule.metric} matches can have this limit; see docs/metrics.md")
        return
    if rule.metric not in known:
        raise ValueError(
            f"no metric {rule.metric}{_meant(rule.metric, [*known, *ALIASES])}; docs/metrics.md lists them"
        )
    if instead := metric_of(rule.metric).judged_by:
        raise ValueError(f"{rule.metric} pools the gaps of all rounds and is never judged; write {instead}")
    metric, limit = known[rule.metric], rule.limit
    if metric.kind == "ambient" or metric.better == "none":
        raise ValueError(f"{rule.metric} has no better direction and is never judged; drop the rule")
    sign = _SIGNS[metric.better]
    if limit.sign not in ("", sign):
        raise ValueError(
            f"{rule.metric} is better when {metric.better}, so what fails is a change of {sign}; write {sign} or no sign"
        )
    if limit.unit not in (None, metric.unit):
        raise ValueError(f"{rule.metric} is in {metric.unit}, not in {limit.unit}; write the limit in its unit or in %")


def _is_misspelt(name: str, names: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(name, list(names), 1, 0.85)) and name not in names


def _meant(wrong: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(names), 1)
    return f" (did you mean {close[0]}?)" if close else ""
