"""The half of the plugin that selects, judges and reports cases; it comes in when there may be some. Imports no torch."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvsuite.case import Case
from kvsuite.distribution.gpus import bind, gpus_for, require_gpu_each
from kvsuite.entry_points import ENGINES, POLICIES, find, warn
from kvsuite.errors import UserError
from kvsuite.metrics.installed import installed_metrics
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.suites.registry import (
    UnusableSuite,
    asked,
    cases_of,
    require_measurable,
    suite_names,
    suite_of_rows,
    take_hooked,
    unusable_suites,
    usable_cases,
    usable_suites,
)

from .case_watch import CaseGuard, case_of, payload_of
from .gate import register_gate, rules_of
from .pytest_benchmark import (
    pytest_benchmark_compare_machine_info,
    pytest_benchmark_update_json,
    pytest_benchmark_update_machine_info,
)
from .reporter import REPORTER, Reporter
from .runnable import require_known_runnable, require_runnable
from .selection import leave_out_unasked, select, take_up
from .signals import Signals
from .stash import (
    BOUND_GPU,
    CASES,
    FINISHED,
    GPUS,
    OPTIONS,
    ORDER_SEED,
    PLACES,
    RESUMED,
    SAVED_GPUS,
    SIGNALS,
    UNUSABLE,
    USAGE_ERROR,
    is_worker,
    worker_input,
)
from .terminal import pytest_report_collectionfinish, pytest_terminal_summary
from .xdist_controller import WORKERS, WorkerGuard

# hooks that stand in files of their own: pytest finds them by name in this module
__all__ = [
    "pytest_benchmark_compare_machine_info", "pytest_benchmark_update_json", "pytest_benchmark_update_machine_info",
    "pytest_report_collectionfinish", "pytest_terminal_summary",
]  # fmt: skip

_NAME = "kvsuite-run"


def begin(config: pytest.Config) -> None:
    """Register this half, once.

    Raises
    ------
    UserError
        If an option's value cannot be, or the run that is to be resumed or compared with cannot be read.
    """
    plugins = config.pluginmanager
    if plugins.has_plugin(_NAME):
        return
    options = config.stash[OPTIONS]
    tell_unusable(config)
    if options.given:
        # only what was asked for is checked
        _check(options)
    config.stash[ORDER_SEED] = worker_input(config).get("kv_order_seed", time.time_ns() % 2**31)
    config.stash[SAVED_GPUS] = []
    config.stash[PLACES] = {}
    config.stash[FINISHED] = frozenset(worker_input(config).get("kv_finished", ()))
    plugins.register(sys.modules[__name__], _NAME)
    register_gate(config, options)
    # plugins of their own: some hooks are told no config
    plugins.register(CaseGuard(config), "kvsuite-cases")
    config.stash[SIGNALS] = Signals()
    plugins.register(config.stash[SIGNALS], "kvsuite-signals")
    if is_worker(config):
        return
    reporter = config.stash[REPORTER] = Reporter(config, options)
    plugins.register(reporter, "kvsuite-reporter")
    config.stash[RESUMED] = take_up(config, reporter)
    if options.of(SweepOptions).plan:
        # nothing is measured, so nothing is spread
        config.option.dist, config.option.tx = "no", []
    elif options.of(SweepOptions).cluster is not None:
        from .cluster_controller import ClusterController

        plugins.register(ClusterController(config, reporter), "kvsuite-cluster")
    elif config.getoption("dist", default="no") != "no":
        config.stash[WORKERS] = WorkerGuard(config, reporter)
        plugins.register(config.stash[WORKERS], "kvsuite-workers")


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give a test with the marker ``kv_suite`` its cases.

    Raises
    ------
    UserError
        If the marker names no suite, or an option's value cannot be.
    """
    marker = metafunc.definition.get_closest_marker("kv_suite")
    if marker is None or "kv_case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    if len(marker.args) != 1:
        raise UserError(f"{metafunc.definition.nodeid}: kv_suite takes one name, for example kv_suite('compression')")
    name = str(marker.args[0])
    _ask_hook(config, metafunc.definition.ihook)
    tell_unusable(config)
    try:
        cases = cases_of(name, config.stash[OPTIONS])
    except UserError as error:
        # what a suite of a bare run refuses ends the run; of another one a test says so, and the suites asked for go on
        unusable = isinstance(error, UnusableSuite)
        if not unusable and (name not in suite_names() or suite_of_rows(name).bare_run_place is not None):
            raise
        metafunc.parametrize("kv_case", [f"{UNUSABLE}{error}"], ids=["unusable"], indirect=True)
        return
    config.stash[CASES].update({(name, case.id): case for case in cases})
    ids = [case.id for case in cases]
    # strings, so that pytest-benchmark can store and compare the parameter
    metafunc.parametrize("kv_case", ids, ids=ids, indirect=True)


def _ask_hook(config: pytest.Config, hook: Any) -> None:
    """Take up the suites of conftests and plugins; those below a folder are known once its conftest is read."""
    name = "pytest_kvsuite_suites"
    impls = getattr(hook, name).get_hookimpls()
    givers = {one.plugin_name: one.plugin for one in impls if not (one.wrapper or one.hookwrapper)}
    for giver, plugin in givers.items():
        # each by itself, so that one that fails keeps no other's suites back
        others = [one for one in config.pluginmanager.get_plugins() if one is not plugin]
        alone = config.pluginmanager.subset_hook_caller(name, others)
        take_hooked(partial(_asked, alone, config), f"{giver}: {name}")


def _asked(hook: Any, config: pytest.Config) -> Iterable[object]:
    found = hook(config=config)
    if not found:
        raise TypeError("it returned None")
    return itertools.chain(*found)


def tell_unusable(config: pytest.Config) -> None:
    """Say once, when the run begins or a conftest has been read, which of what packages bring is left out."""
    capture, terminal = (config.pluginmanager.get_plugin(name) for name in ("capturemanager", "terminalreporter"))
    # tests are being collected, and what goes to stderr meanwhile is kept from who has to see it
    with nullcontext() if capture is None else capture.global_and_fixture_disabled():
        if terminal is not None:
            terminal.ensure_newline()
        for line in unusable_suites():
            warn(line)
        installed_metrics()
        # of two of one name the second is told of; none is imported before it is asked for
        for group in (ENGINES, POLICIES):
            find(group)


def _check(options: Options) -> None:
    for suite in usable_suites():
        usable_cases(suite.name, options)
        try:
            asked(suite, partial(suite.check, options), "check()")
        except UnusableSuite as fault:
            # what it would have refused is found out by its cases
            warn(str(fault))
    options.of(SweepOptions).check(options.given)
    common = options.of(CommonOptions)
    rules_of(options)
    if "model" in options.given:
        from kvsuite.models.resolve import resolve_model

        resolve_model(common.model, cache_dir=Path(common.cache_dir) if common.cache_dir else None)
    if "corpus" in options.given:
        from kvsuite.workloads.corpus import check_corpus

        check_corpus(common.corpus)


# before xdist starts its workers and the header is shown
@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    try:
        require_known_runnable(session.config)
    except UserError as error:
        raise pytest.UsageError(f"kvsuite: {error}") from error


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    # --benchmark-only and --benchmark-skip look for the name of a fixture that kv_run asks for only when rounds are timed
    asked = any(config.getoption(name, default=False) for name in ("benchmark_only", "benchmark_skip"))
    lacking: list[list[str]] = []
    for item in items if asked else []:
        # the list is shared by the cases of one test
        if case_of(config, item) and "benchmark" not in item.fixturenames:  # type: ignore[attr-defined]
            item.fixturenames.append("benchmark")  # type: ignore[attr-defined]
            lacking.append(item.fixturenames)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for one in lacking:
            one.remove("benchmark")
    leave_out_unasked(config, items)
    before = len(items)
    cases = select(config, items)
    try:
        _bind(config, cases)
        _expect(config, cases, [item.nodeid for item in items], left_out=len(items) < before)
    except UserError as error:
        raise pytest.UsageError(f"kvsuite: {error}") from error


def _bind(config: pytest.Config, cases: list[tuple[str, Case]]) -> None:
    """Let a worker see its own GPU alone, before torch is loaded."""
    if not cases or not is_worker(config):
        return
    gpus, slot = gpus_for(config.stash[OPTIONS].of(CommonOptions).device), worker_input(config).get("kv_slot", 0)
    # too many workers are refused by the controller
    if gpus is not None and slot < len(gpus.entries):
        config.stash[GPUS] = gpus
        config.stash[BOUND_GPU] = bind(gpus, slot)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    # the controller of xdist collects nothing itself
    config = node.config
    workers = config.stash[WORKERS]
    if workers.is_expecting:
        return
    options = config.stash[OPTIONS]
    brackets = {node_id: node_id.rpartition("[")[2].removesuffix("]") for node_id in ids}
    try:
        _ask_hook(config, config.hook)
        tell_unusable(config)
        known: dict[str, Case] = {}
        for case in (case for name in suite_names() for case in usable_cases(name, options)):
            if case.id in brackets.values() and known.setdefault(case.id, case) != case:
                raise UserError(
                    f"suites {known[case.id].suite} and {case.suite} both have a case {case.id}, which the controller of "
                    "xdist cannot tell apart; name one otherwise, or leave -n out"
                )
        selected = [(node_id, known[bracket]) for node_id, bracket in brackets.items() if bracket in known]
        require_runnable(config, [case for _, case in selected])
        if selected:
            device = options.of(CommonOptions).device
            require_gpu_each(gpus_for(device), device, workers.workers)
            workers.expect(selected)
        _expect(config, selected, ids, left_out=False)
    except UserError as error:
        raise pytest.UsageError(f"kvsuite: {error}") from error


def _expect(config: pytest.Config, cases: list[tuple[str, Case]], ids: list[str], *, left_out: bool) -> None:
    """The controller, or the only process, learns what is going to be measured."""
    reporter = config.stash.get(REPORTER, None)
    if reporter is None or config.option.collectonly or config.stash[OPTIONS].of(SweepOptions).plan:
        return
    if cases:
        require_measurable([case for _, case in cases])
        require_runnable(config, [case for _, case in cases])
    if cases or left_out:
        reporter.expect(cases, ids)
    # not of a run that was refused
    reporter.left_out = reporter.left_out or left_out
    if cases:
        config.stash[SIGNALS].take_over(config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and (payload := payload_of(item)) is not None:
        # an attribute of the report travels through xdist and stays out of the JUnit XML
        report.kvsuite = payload  # type: ignore[attr-defined]
    if USAGE_ERROR in item.stash:
        report.kvsuite_usage_error = item.stash[USAGE_ERROR]  # type: ignore[attr-defined]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    config = session.config
    if not config.stash[OPTIONS].of(SweepOptions).plan or is_worker(config):
        return None
    from kvsuite.console import console_text, console_width
    from kvsuite.distribution.node_plan import nodes_table
    from kvsuite.distribution.plan import plan_table

    cases = [case for item in session.items if (case := case_of(config, item)) is not None]
    workers = int(config.getoption("numprocesses", default=None) or 1)
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    try:
        options = config.stash[OPTIONS]
        elsewhere = options.of(SweepOptions).nodes is not None
        table = nodes_table(cases, options) if elsewhere else plan_table(cases, options, workers=workers)
    except UserError as error:
        raise pytest.UsageError(f"kvsuite: {error}") from error
    if terminal is not None:
        terminal.ensure_newline()
        terminal.section("kvsuite plan")
        is_terminal = config.get_terminal_writer().hasmarkup
        terminal.write_line(console_text(table, width=console_width(is_terminal)))
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.stash.get(REPORTER, None)
    if reporter is None:
        return
    reporter.finish()
    if session.config.stash[SIGNALS].heard:
        # also where it came while the reports were written
        session.exitstatus = pytest.ExitCode.INTERRUPTED
    if reporter.left_out and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        # the earlier run, or the other shards, have all
        session.exitstatus = pytest.ExitCode.OK
    failed = reporter.nothing_ran or reporter.failure or reporter.kept_failures
    if failed and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
