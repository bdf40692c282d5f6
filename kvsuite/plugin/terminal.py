"""What a run says on the terminal: what it is going to measure, the table at the end."""

from __future__ import annotations

from typing import Any

import pytest

from kvsuite.case import Case
from kvsuite.distribution.progress import about
from kvsuite.foreign_text import visible
from kvsuite.meters.host_load import busy_now
from kvsuite.options.common import CommonOptions
from kvsuite.options.sweep import SweepOptions

from .case_watch import case_of
from .pytest_benchmark import other_gpus
from .reporter import REPORTER, Reporter
from .stash import OPTIONS, ORDER_SEED, UNASKED
from .xdist_controller import WORKERS


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    cases = [case for item in items if (case := case_of(config, item)) is not None]
    if config.getoption("verbose") < 0:
        return []
    return [*_beginning(config, cases), *_unasked(config)]


def _beginning(config: pytest.Config, cases: list[Case]) -> list[str]:
    if not cases:
        return []
    first = cases[0]
    order = config.stash[ORDER_SEED]
    number = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    lines = [
        f"kvsuite: {number} on {first.device} ({first.engine}, {first.model}), order seed {order}, "
        f"reports under {config.stash[OPTIONS].of(CommonOptions).report_dir}/"
    ]
    reporter = config.stash.get(REPORTER, None)
    if reporter is None or config.stash[OPTIONS].of(SweepOptions).plan:
        return lines
    if reporter.expected_s is not None:
        lines.append(
            f"kvsuite: {about(reporter.expected_s)} in all, by measured cases and a model (--kv-plan shows it)"
        )
    busy = busy_now()
    if busy is not None:
        lines.append(
            f"kvsuite: this machine is busy ({busy}): times will scatter, and small differences mean nothing; close other "
            "programs, or see what can be told with: python -m kvsuite doctor"
        )
    return [visible(line) for line in lines]


def _unasked(config: pytest.Config) -> list[str]:
    return [visible(f"kvsuite: {line}") for line in config.stash.get(UNASKED, [])]


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if WORKERS in config.stash:
        # what they left out they tell when they are done
        for line in _unasked(config):
            terminalreporter.write_line(line)
    reporter = config.stash.get(REPORTER, None)
    if reporter is None:
        return
    if reporter.rows:
        _tell_results(terminalreporter, config, reporter)
    if exitstatus == pytest.ExitCode.INTERRUPTED and reporter.is_kept and reporter.cases_left:
        left = "1 case is left" if reporter.cases_left == 1 else f"{reporter.cases_left} cases are left"
        terminalreporter.write_line(f"{left}: go on by the same command with --kv-resume=latest", yellow=True)


def _tell_results(terminalreporter: Any, config: pytest.Config, reporter: Reporter) -> None:
    from kvsuite.console import console_text, console_width
    from kvsuite.suites.outputs import by_suite, run_table, unread_options

    terminalreporter.section("kvsuite")
    is_terminal = config.get_terminal_writer().hasmarkup
    table = console_text(run_table(reporter.run, reporter.rows), width=console_width(is_terminal))
    terminalreporter.write_line(table)
    for option in unread_options([suite for suite, _ in by_suite(reporter.rows)], config.stash[OPTIONS]):
        terminalreporter.write_line(f"warning: {option}: nothing that was selected reads it")
    if reporter.is_kept:
        terminalreporter.write_line(visible(f"records and figures: {reporter.folder}"))
        if reporter.page is not None:
            terminalreporter.write_line(visible(f"report: {reporter.page}"))
    if reporter.kept_failures:
        terminalreporter.write_line(
            f"error: {reporter.kept_failures} failed cases of the resumed run were kept; --kv-resume-rerun measures them again",
            red=True,
        )
    for note in other_gpus(config):
        terminalreporter.write_line(visible(note), yellow=True)
    if reporter.failure:
        terminalreporter.write_line(visible(f"error: {reporter.failure}"), red=True)
    if reporter.nothing_ran:
        terminalreporter.write_line(visible(f"error: no selected case could run: {reporter.nothing_ran}"), red=True)
