"""Fixtures: a case, and what measures it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .case import Case
from .errors import UserError
from .options import Options
from .record import Record
from .state import CASES, MEASURED, OPTIONS, REPORTER, RUNNER, is_worker

_HEADLINE = ("perplexity", "ttft_s", "tpot_s", "decode_tok_s_agg", "kv_bytes_exact", "mem_measured_peak_bytes")


@pytest.fixture(scope="session")
def kv_options(pytestconfig: pytest.Config) -> Options:
    """The resolved ``--kv-*`` options."""
    return pytestconfig.stash[OPTIONS]


@pytest.fixture
def kv_case(request: pytest.FixtureRequest) -> Case:
    """The case of this test; parametrised by the ``kv_suite`` marker."""
    return request.config.stash[CASES][request.param]


@pytest.fixture(scope="session")
def kv_runner(pytestconfig: pytest.Config, kv_options: Options) -> Iterator[Any]:
    """The `kvsuite.measurement.CaseRunner` of this process; sessions are shared between the cases of one model."""
    from .engines.registry import SessionPool
    from .measurement import CaseRunner
    from .meters.environment import gpu_facts, host_facts
    from .metrics import MetricRegistry

    registry = MetricRegistry(())
    for metrics in pytestconfig.hook.pytest_kvsuite_metrics(config=pytestconfig):
        for metric in metrics:
            registry.add(metric)
    environment = host_facts() | {"gpu": gpu_facts(next(iter(pytestconfig.stash[CASES].values())).device)}
    pytestconfig.hook.pytest_kvsuite_update_env(config=pytestconfig, environment=environment)
    sessions = SessionPool(
        seed=kv_options.seed,
        threads=kv_options.threads,
        decode_step=kv_options.decode_step,
        implementation=kv_options.impl,
        cache_dir=None if kv_options.cache_dir is None else Path(kv_options.cache_dir).expanduser(),
    )
    runner = pytestconfig.stash[RUNNER] = CaseRunner(kv_options, registry, environment, sessions)
    yield runner
    sessions.close()


@pytest.fixture
def kv_run(request: pytest.FixtureRequest, kv_runner: Any) -> Callable[[Case], Record]:
    """Measure a case: returns its record, skips where it cannot run, fails where it failed. The record is kept either way."""
    config = request.config

    def run(case: Case) -> Record:
        reporter = config.stash.get(REPORTER, None)
        progress = None if reporter is None or is_worker(config) else reporter.phases(case)
        try:
            measured = kv_runner.run(
                case,
                request.node.nodeid,
                order_index=_order_index(request),
                run_rounds=_rounds_of(request),
                progress=progress,
            )
        except UserError as error:
            if is_worker(config):
                pytest.fail(f"kvsuite: {error}", pytrace=False)
            pytest.exit(f"kvsuite: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
        request.node.stash[MEASURED] = measured
        record: Record = measured.record
        cases: list[str] = [*config.stash[CASES]]
        record.case_index = cases.index(case.id) if case.id in cases else 0
        record.effective["concurrent_workers"] = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        config.hook.pytest_kvsuite_update_record(config=config, record=record, session=kv_runner.sessions.current)
        if "benchmark" in request.node.funcargs:
            request.node.funcargs["benchmark"].extra_info.update(headline(record))
        if record.status in ("skipped", "invalid"):
            pytest.skip(f"{record.status}: {record.reason}")
        if record.status != "ok":
            failure = record.error or {}
            pytest.fail(f"{record.status} in {failure.get('phase')}: {failure.get('message')}", pytrace=False)
        return record

    return run


def _order_index(request: pytest.FixtureRequest) -> int:
    return next((i for i, item in enumerate(request.session.items) if item is request.node), 0)


def _rounds_of(request: pytest.FixtureRequest) -> Any:
    """Timed rounds through pytest-benchmark where it is active, so that its files and tables hold them too."""
    from .measurement import plain_rounds

    config = request.config
    absent = not config.pluginmanager.hasplugin("benchmark") or config.getoption("benchmark_disable", default=False)
    # pytest-benchmark switches itself off under xdist, and an unused fixture of its would warn
    if absent or is_worker(config):
        return plain_rounds

    def through_benchmark(round_: Callable[[], None], rounds: int) -> None:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.pedantic(round_, rounds=rounds, iterations=1, warmup_rounds=0)

    return through_benchmark


def headline(record: Record) -> dict[str, Any]:
    """The few numbers that pytest-benchmark's ``extra_info`` repeats."""
    found = {name: record.metrics[name]["value"] for name in _HEADLINE if name in record.metrics}
    return {"case_key": record.case_key, **found}
