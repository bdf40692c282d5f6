"""Suites by name. kvsuite's own come through the entry-point group that everybody uses; conftests have a hook."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, TypeVar

from kvsuite.case import Case
from kvsuite.entry_points import OURS, SUITES, described, find, in_a_line, load, package
from kvsuite.errors import UserError
from kvsuite.options.option import options_in
from kvsuite.options.resolve import Options

from .suite import Suite

if TYPE_CHECKING:
    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement


Answer = TypeVar("Answer")

# suites that a hook gave, by name
_hooked: dict[str, Suite] = {}
# what hooks gave that cannot be used: a line each, by the name of the suite where it has one
_unusable_hooked: dict[str, str] = {}


class UnusableSuite(UserError):
    """A suite that is installed and cannot be used: the message names package, object and mend. Others go on working."""


class _AbsentSuite(Suite):
    """Stands for a suite that is not installed here: its rows can be shown all the same."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def cases(self, options: Options) -> list[Case]:
        raise UserError(f"suite {self.name}: is not installed here, only rows of it are known; install its package")

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        # a case made by hand under a name of its own
        by_hand = next(suite for suite in usable_suites() if suite.measures_by_hand)
        return by_hand.measure(case, session, run)


def suite_names() -> list[str]:
    """Names of all suites, usable or not, in alphabetical order; imports none."""
    return sorted({*_entries(), *_hooked})


def suite_named(name: str) -> Suite:
    """The suite of that name.

    Raises
    ------
    UnusableSuite
        If it cannot be imported, or is no suite.
    UserError
        If there is none.
    """
    if name in _hooked:
        return _hooked[name]
    entry = _entries().get(name)
    if entry is not None:
        return _loaded(entry)
    if name in _unusable_hooked:
        raise UnusableSuite(_unusable_hooked[name])
    unknown = f"kv_suite({name!r}): unknown suite; known: {', '.join(suite_names())}"
    if _unusable_hooked:
        # a hook that failed may have meant to give it
        raise UnusableSuite(f"{unknown}; and {'; '.join(_unusable_hooked.values())}")
    raise UserError(unknown)


def suite_of_rows(name: str) -> Suite:
    """The suite that shows rows of that name: one with tables of a general kind where it is not installed or unusable."""
    try:
        return suite_named(name)
    except UserError:
        return _AbsentSuite(name)


def measuring_suite(name: str) -> Suite:
    """The suite that measures cases of that name; those that were made by hand, of no suite, as one that says so.

    Raises
    ------
    UnusableSuite
        If the suite is installed and cannot be used.
    """
    return suite_named(name) if name in suite_names() else _AbsentSuite(name)


def usable_suites() -> list[Suite]:
    """Every suite that can be used: those of a bare run in their order, then the others by name."""
    found = []
    for name in suite_names():
        try:
            found.append(suite_named(name))
        except UnusableSuite:
            continue
    return in_order(found)


def unusable_suites() -> list[str]:
    """A line for every suite that cannot be used: package, object and mend."""
    found = []
    for name in suite_names():
        try:
            suite_named(name)
        except UnusableSuite as fault:
            found.append(str(fault))
    return found + list(_unusable_hooked.values())


def is_of_bare_run(name: str) -> bool:
    """Whether a bare ``pytest`` measures the suite of that name; of one that cannot be used nobody knows."""
    return suite_of_rows(name).bare_run_place is not None


def in_order(suites: Iterable[Suite]) -> list[Suite]:
    """Suites of a bare run in their order, then the others by name."""
    return sorted(
        suites, key=lambda suite: (suite.bare_run_place is None, suite.bare_run_place or 0, suite.name)
    )  # fmt: skip


def take_hooked(ask: Callable[[], Iterable[object]], where: str) -> None:
    """Add suites that a hook of a conftest or plugin gives; the same class may come again.

    What cannot be used is kept as a line (`unusable_suites`), and the others are taken.

    Parameters
    ----------
    ask
        Calls the hook of one plugin.
    where
        The plugin and its hook, for messages.
    """
    try:
        found = list(ask())
    except Exception as error:  # the hook is somebody else's
        _unusable_hooked[where] = f"{where}: failed ({in_a_line(error)}); return a list of suites from it"
        return
    for given in found:
        place = f"{where}: {_described(given)}"
        try:
            suite = _checked(given, place, None)
            known = _hooked.get(suite.name)
            if suite.name in _entries() or (known is not None and type(known) is not type(suite)):
                taken = _described(known) if known is not None else described(_entries()[suite.name])
                raise UserError(f"{place}: the name {suite.name} is taken by {taken}; rename it")
        except UserError as error:
            name = getattr(given, "name", None)
            _unusable_hooked[name if isinstance(name, str) and name not in suite_names() else place] = str(error)
            continue
        _hooked[suite.name] = suite


def cases_of(name: str, options: Options) -> list[Case]:
    """Cases of a suite in the order of its space.

    Raises
    ------
    UnusableSuite
        If it cannot be used, or gives no cases whatever the options.
    UserError
        For an unknown suite, or options that give no case.
    """
    suite = suite_named(name)
    cases = asked(suite, lambda: list(suite.cases(options)), "cases()")
    if not cases:
        raise UnusableSuite(
            f"{_where(suite)}: cases() gave no case; give at least one, or raise a UserError that says why"
        )
    twice = [one for one, count in Counter(case.id for case in cases if isinstance(case, Case)).items() if count > 1]
    if twice:
        raise UnusableSuite(f"{_where(suite)}: cases() gave two cases with the id {twice[0]}; name them apart")
    wrong = next((case for case in cases if not isinstance(case, Case) or case.suite != name), None)
    if wrong is not None:
        raise UnusableSuite(f"{_where(suite)}: cases() gave {wrong!r}, which is no case of suite {name}; set its suite")
    return cases


def asked(suite: Suite, ask: Callable[[], Answer], what: str) -> Answer:
    """What a suite answers before anything is measured.

    Raises
    ------
    UnusableSuite
        If a suite of somebody else fails.
    UserError
        What the suite itself refuses.
    """
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:
        if _is_ours(suite):
            raise
        raise UnusableSuite(
            f"{_where(suite)}: {what} failed ({in_a_line(error)}); correct it, or leave the suite out"
        ) from error


def usable_cases(name: str, options: Options) -> list[Case]:
    """Cases of a suite; none of one that is not there or cannot be used.

    Raises
    ------
    UserError
        For options that give no case of a suite of a bare run, or of one whose own options were given.
    """
    try:
        return cases_of(name, options)
    except UnusableSuite:
        return []
    except UserError:
        suite = suite_of_rows(name)
        own = options_in(suite.option_group) if suite.option_group is not None else ()
        if suite.bare_run_place is None and options.given.isdisjoint(option.field for option in own):
            # whoever asks for it is told
            return []
        raise


def require_measurable(cases: Sequence[Case]) -> None:
    """Refuse a selection of which no case can say anything.

    Raises
    ------
    UserError
        If all cases ask for quality alone, of a model with random weights.
    """
    if cases and all(suite_of_rows(case.suite).is_quality_alone and case.model.startswith("dummy:") for case in cases):
        raise UserError(
            f"--kv-model={cases[0].model}: random weights have no perplexity, and nothing else is selected; name a real "
            "model"
        )


@functools.cache
def _entries() -> Mapping[str, EntryPoint]:
    found = find(SUITES)
    if not any(package(entry) == OURS for entry in found.values()):
        raise UserError(
            "the entry points of kvsuite are not those of this version; install it again (pip install -e .)"
        )
    return found


@functools.cache
def _loaded_or_fault(name: str) -> Suite | str:
    entry = _entries()[name]
    try:
        return _checked(load(entry), described(entry), name)
    except UserError as error:
        if package(entry) == OURS:
            raise
        return str(error)


def _loaded(entry: EntryPoint) -> Suite:
    found = _loaded_or_fault(entry.name)
    if isinstance(found, str):
        raise UnusableSuite(found)
    return found


def _checked(given: object, where: str, name: str | None) -> Suite:
    """An instance of what an entry point or a hook gave."""
    suite = given
    if isinstance(given, type) and issubclass(given, Suite):
        if inspect.isabstract(given):
            members = ", ".join(sorted(given.__abstractmethods__))
            raise UserError(f"{where}: lacks {members}; define what kvsuite.suites.suite.Suite declares abstract")
        try:
            suite = given()
        except Exception as error:  # its constructor is somebody else's
            raise UserError(
                f"{where}: cannot be made ({in_a_line(error)}); give it a constructor without parameters"
            ) from error
    if not isinstance(suite, Suite):
        raise UserError(f"{where}: is no subclass of kvsuite.suites.suite.Suite; name a class that is one")
    own = getattr(suite, "name", None)
    if not isinstance(own, str) or not own:
        raise UserError(f"{where}: has no name; set its attribute name")
    if name is not None and own != name:
        raise UserError(f"{where}: is named {own}, its entry point {name}; give both the same name")
    return suite


def _described(given: object) -> str:
    if not isinstance(given, type | Suite):
        return repr(given)
    of = given if isinstance(given, type) else type(given)
    return f"{of.__module__}:{of.__qualname__}"


def _where(suite: Suite) -> str:
    entry = None if suite.name in _hooked else _entries().get(suite.name)
    return _described(suite) if entry is None else described(entry)


def _is_ours(suite: Suite) -> bool:
    entry = None if suite.name in _hooked else _entries().get(suite.name)
    return entry is not None and package(entry) == OURS
