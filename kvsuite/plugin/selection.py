"""Which of the collected cases this process runs, and in what order: shard, rotation, what an earlier run has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

from kvsuite.case import Case
from kvsuite.distribution.order import rotated
from kvsuite.distribution.shards import assign
from kvsuite.options.common import CommonOptions
from kvsuite.options.sweep import SweepOptions
from kvsuite.suites.registry import is_of_bare_run, suite_names
from kvsuite.survival.resume import find_earlier, is_finished

from .case_watch import case_of, suite_name
from .reporter import Reporter
from .stash import FINISHED, OPTIONS, ORDER_SEED, PLACES, PLANNED, UNASKED, is_worker

# a word of -k, as pytest cuts it
_WORD = re.compile(r"[\w:+.\[\]\\/=-]+")


def take_up(config: pytest.Config, reporter: Reporter) -> str | None:
    """Read the run that ``--kv-resume`` names; return what to say of it.

    Raises
    ------
    UserError
        If it cannot be resumed.
    """
    options = config.stash[OPTIONS].of(SweepOptions)
    if options.resume is None:
        return None
    report_dir = Path(config.stash[OPTIONS].of(CommonOptions).report_dir)
    shard = None if options.shard is None else str(options.shard)
    earlier = find_earlier(options.resume, report_dir, options.resume_rerun, shard=shard)
    if earlier is None:
        of = "without --kv-shard" if shard is None else f"of --kv-shard={shard}"
        return f"--kv-resume={options.resume}: no run {of} under {report_dir}/ yet, a new one begins"
    reporter.go_on(earlier)
    config.stash[FINISHED] = frozenset(earlier.finished())
    # every case keeps its place, so that the finished run is the one that was not disturbed
    config.stash[ORDER_SEED] = int(earlier.run.get("order_seed", config.stash[ORDER_SEED]))
    again = len(earlier.rows) - len(earlier.kept)
    told = [f"resumes {earlier.folder}: {len(earlier.kept)} cases have a record"]
    told += [f"{again} failed ones run again ({','.join(options.resume_rerun)})"] if again else []
    return "; ".join([*told, *earlier.notes])


def leave_out_unasked(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of suites that are no part of a bare run, unless their file was given or ``-k`` names them."""
    unasked: dict[str, list[pytest.Item]] = {}
    keyword = config.option.keyword
    named = _names_something(keyword)
    for item in items:
        suite = suite_name(item)
        if suite is None or item.session.isinitpath(item.path) or is_of_bare_run(suite):
            continue
        if not named or not _is_meant(keyword, item, suite):
            unasked.setdefault(suite, []).append(item)
    left_out = {item for own in unasked.values() for item in own}
    if not left_out:
        return
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=[item for own in unasked.values() for item in own])
    # who names another suite need not be told of this one
    lines = [] if named else [_told(suite, own) for suite, own in unasked.items()]
    config.stash[UNASKED] = lines
    if is_worker(config):
        config.workeroutput["kv_unasked"] = lines  # type: ignore[attr-defined]


def _names_something(keyword: str) -> bool:
    # what holds of a test without any name (not dse) leaves out and asks for nothing
    return bool(keyword) and not Expression.compile(keyword).evaluate(lambda name, /, **_: False)


def _is_meant(keyword: str, item: pytest.Item, suite: str) -> bool:
    """Whether ``-k`` means a case that it matches: in ``-k compression`` the word is a suite, not a part of an id.

    A case of the suite pipeline may be called ``compression-only``.
    """
    known = set(suite_names())
    if suite in _WORD.findall(keyword.lower()):
        return True
    matches = KeywordMatcher.from_item(item)

    def holds(name: str, /, **_: str | int | bool | None) -> bool:
        return name.lower() == suite if name.lower() in known else matches(name)

    return Expression.compile(keyword).evaluate(holds)


def _told(suite: str, items: list[pytest.Item]) -> str:
    files = dict.fromkeys(item.nodeid.partition("::")[0] for item in items)
    return (
        f"suite {suite} is left out ({len(items)} cases of {', '.join(files)}): it is no part of a bare run; give its file, "
        f"or -k {suite}"
    )


def select(config: pytest.Config, items: list[pytest.Item]) -> list[tuple[str, Case]]:
    """Order ``items`` and leave out what others run or ran; other tests keep their places.

    Returns
    -------
    list of (str, Case)
        Node ids and cases that are left.
    """
    found = {item: case for item in items if (case := case_of(config, item)) is not None}
    config.stash[PLACES] = {item.nodeid: place for place, item in enumerate(items)}
    if not found:
        return []
    config.stash[PLANNED] = list(found.values())
    left_out = _of_other_shards(config, found)
    kept = [item for item in items if item not in left_out]
    _rotate(config, kept, found)
    config.stash[PLACES] = {item.nodeid: place for place, item in enumerate(kept)}
    finished = config.stash[FINISHED]
    left_out |= {item for item, case in found.items() if is_finished(item.nodeid, case, finished)}
    items[:] = [item for item in kept if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
        if is_worker(config):
            config.workeroutput["kv_left_out"] = True  # type: ignore[attr-defined]
    return [(item.nodeid, found[item]) for item in items if item in found]


def _of_other_shards(config: pytest.Config, found: dict[pytest.Item, Case]) -> set[pytest.Item]:
    options = config.stash[OPTIONS]
    shard = options.of(SweepOptions).shard
    if shard is None:
        return set()
    from kvsuite.distribution.cost import units, work_of

    # in whichever order they were collected: by paths that were given, or by a plugin that shuffles
    items = sorted(found, key=lambda item: item.nodeid)
    parts = assign([units(work_of(found[item], options)) for item in items], shard.of)
    return {item for item, part in zip(items, parts, strict=True) if part != shard.index}


def _rotate(config: pytest.Config, items: list[pytest.Item], cases: dict[pytest.Item, Case]) -> None:
    # no method always runs first: the order inside a suite is rotated by a seed that the records carry
    for suite in dict.fromkeys(cases[item].suite for item in items if item in cases):
        ours = [index for index, item in enumerate(items) if item in cases and cases[item].suite == suite]
        order = rotated([(cases[items[index]], items[index]) for index in ours], config.stash[ORDER_SEED])
        for index, item in zip(ours, order, strict=True):
            items[index] = item
