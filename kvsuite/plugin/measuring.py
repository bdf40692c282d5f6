"""What the fixtures do: open the runner of this process, and measure one case of one test."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.case import Case, canonical_json, digest
from kvsuite.errors import UserError
from kvsuite.foreign_text import visible, visible_lines
from kvsuite.kernel_builds import BUILDS
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.record import Record
from kvsuite.store.validate import validate
from kvsuite.suites.registry import measuring_suite, suite_of_rows

from .case_watch import note_place, tell_box
from .reporter import REPORTER
from .stash import (
    BOUND_GPU,
    CLUSTER,
    GPUS,
    MEASURED,
    OPTIONS,
    PLACES,
    PLANNED,
    RUNNER,
    SIGNALS,
    USAGE_ERROR,
    is_worker,
    worker_input,
)

if TYPE_CHECKING:
    from kvsuite.engines.engine import Session
    from kvsuite.engines.registry import SessionPool


def open_runner(config: pytest.Config) -> Iterator[Any]:
    """Yield the `kvsuite.measure.runner.CaseRunner` of this process, and close its session afterwards."""
    from kvsuite.engines.registry import SessionPool
    from kvsuite.measure.runner import CaseRunner
    from kvsuite.meters.environment import gpu_facts, host_facts
    from kvsuite.metrics.registry import MetricRegistry

    options = config.stash[OPTIONS]
    registry = MetricRegistry(())
    for metrics in config.hook.pytest_kvsuite_metrics(config=config):
        for metric in metrics:
            registry.add(metric)
    sessions = SessionPool(options)
    planned = config.stash.get(PLANNED, ())
    environment = host_facts(worker_input(config).get("mainargv")) | {
        "gpu": gpu_facts(resolve_device(options.of(CommonOptions).device)),
        "engines": _versions(sessions, planned),
    }
    update_environment(config, environment)
    runner = config.stash[RUNNER] = CaseRunner(
        options, registry, environment, sessions, measuring_suite, planned=planned,
        watch=partial(tell_box, config), pass_on=config.stash[SIGNALS].pass_on,
    )  # fmt: skip
    yield runner
    sessions.close()


def update_environment(config: pytest.Config, environment: dict[str, Any]) -> None:
    """Let the hooks of users add facts to an environment.

    Raises
    ------
    UserError
        If what they add cannot be written.
    """
    config.hook.pytest_kvsuite_update_env(config=config, environment=environment)
    _require_json(environment, "pytest_kvsuite_update_env: a hook of yours added")


def _versions(sessions: SessionPool, planned: Sequence[Case]) -> dict[str, dict[str, str]]:
    """Versions of all that computes, by engine."""
    found = {}
    for name in sorted({case.engine for case in planned}):
        # an engine that cannot be used is told of when its first case begins
        with contextlib.suppress(UserError):
            found[name] = sessions.versions(name)
    return found


def measurer(request: pytest.FixtureRequest, runner: Any) -> Callable[[Case], Record]:
    """What measures the case of a test with ``runner``."""
    config, stash = request.config, request.node.stash
    # left by an earlier try of the same test
    for key in (MEASURED, USAGE_ERROR):
        if key in stash:
            del stash[key]

    def run(case: Case) -> Record:
        if MEASURED in stash:
            raise UserError(f"{request.node.nodeid}: kv_run measures one case per test; parametrize the test instead")
        reporter = config.stash.get(REPORTER, None)
        progress = None if reporter is None or is_worker(config) else reporter.phases(case)
        rounds = _Rounds(request)
        try:
            with contextlib.nullcontext() if reporter is None else BUILDS.telling(reporter.shows):
                measured = runner.run(
                    case,
                    request.node.nodeid,
                    order_index=_order_index(request),
                    run_rounds=rounds,
                    progress=progress,
                )
            record: Record = measured.record
            note_place(config, record)
            if CLUSTER not in config.stash:
                _note_company(config, record)
            record.env = digest(runner.environment)
            _require_json(record.to_dict(), f"suite {case.suite} or engine {case.engine} measured")
        except UserError as error:
            if not is_worker(config):
                pytest.exit(f"kvsuite: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
            stash[USAGE_ERROR] = str(error)
            pytest.fail(f"kvsuite: {error}", pytrace=False)
        # from now on the row is kept, whatever else goes wrong
        stash[MEASURED] = measured
        failed = update_record(config, record, runner.sessions.current)
        rounds.extra_info.update(headline(record))
        if failed:
            told = "; ".join(failed)
            pytest.fail(
                visible(f"kvsuite: {told}; the row ({record.status}) is kept as it was measured"), pytrace=False
            )
        if record.status in ("skipped", "invalid"):
            pytest.skip(visible(f"{record.status}: {record.reason}"))
        if record.status != "ok":
            failure = record.error or {}
            told = visible_lines(f"{record.status} in {failure.get('phase')}: {failure.get('message')}")
            pytest.fail(told, pytrace=False)
        return record

    return run


def _order_index(request: pytest.FixtureRequest) -> int:
    return request.config.stash[PLACES].get(request.node.nodeid, 0)


def _note_company(config: pytest.Config, record: Record) -> None:
    """Say how many workers measured at the same time, and on which GPU this one did."""
    workers = record.effective["concurrent_workers"] = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    gpus = config.stash.get(GPUS, None)
    if gpus is not None:
        record.effective["gpu"] = {"visible": config.stash[BOUND_GPU], "simulated": gpus.simulated}
        if gpus.simulated:
            record.warnings.append("simulated GPU: measured on the CPU")
    if workers > 1 and record.status == "ok":
        where = "its times are a shared machine's"
        if gpus is not None and not gpus.simulated:
            where = "each on a GPU of its own; they share CPU, power and PCIe"
        record.warnings.append(f"timed beside {workers - 1} other xdist worker(s): {where}")


class _Rounds:
    """Timed rounds: through pytest-benchmark where it is active, so that its files and tables hold them too."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self.extra_info: dict[str, Any] = {}

    def __call__(self, round_: Callable[[], None], rounds: int) -> None:
        from kvsuite.measure.runner import plain_rounds

        session = self._request.config.pluginmanager.get_plugin("pytest-benchmark")
        # it switches itself off under xdist; its fixture warns where it is asked for and not used
        if session is None or session.disabled:
            plain_rounds(round_, rounds)
            return
        benchmark = self._request.getfixturevalue("benchmark")
        self.extra_info = benchmark.extra_info
        benchmark.pedantic(round_, rounds=rounds, iterations=1, warmup_rounds=0)


def update_record(config: pytest.Config, record: Record, session: Session | None) -> list[str]:
    """Let the hooks of users change a record that was measured; what one of them spoils is undone, and a warning of the record.

    Returns
    -------
    list of str
        The warnings, which name hook and plugin.
    """
    name, manager, failed = "pytest_kvsuite_update_record", config.pluginmanager, []
    known = [(one.plugin_name, one.plugin) for one in config.hook.pytest_kvsuite_update_record.get_hookimpls()]
    # in pluggy's order: what was registered last comes first
    for plugin_name, plugin in reversed(known):
        hook = manager.subset_hook_caller(name, [other for _, other in known if other is not plugin])
        before = copy.deepcopy(vars(record))
        try:
            hook(config=config, record=record, session=session)
            row = record.to_dict()
            canonical_json(row)
            validate("record", row, record.id)
        except Exception as error:
            vars(record).update(before)
            if isinstance(error, pytest.exit.Exception):
                raise
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failed.append(f"{name} of {visible(plugin_name)} failed, and what it did is left out: {visible(what)}")
            record.warnings.append(failed[-1])
    return failed


def _require_json(facts: dict[str, Any], who: str) -> None:
    # what cannot be written would take the rows of the other cases with it
    try:
        canonical_json(facts)
    except (TypeError, ValueError) as error:
        raise UserError(f"{who} what JSON cannot hold ({error}); make it numbers, texts, lists") from error


def headline(record: Record) -> dict[str, Any]:
    """The few numbers that pytest-benchmark's ``extra_info`` repeats."""
    names = suite_of_rows(record.case.suite).headline or record.metrics
    found = {name: record.metrics[name]["value"] for name in names if name in record.metrics}
    return {"case_key": record.case_key, **found}
