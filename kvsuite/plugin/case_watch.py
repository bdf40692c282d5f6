"""In the process that measures: says what is running, stops in time, and ends a worker that nothing can be trusted of."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvsuite.case import Case, digest
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.sweep import SweepOptions
from kvsuite.record import Record
from kvsuite.survival.black_box import BlackBox
from kvsuite.survival.death import die_with_parent

from .reporter import REPORTER
from .stash import (
    BOX,
    CASES,
    CLUSTER,
    MEASURED,
    OPTIONS,
    ORDER_SEED,
    PLACES,
    RUNNER,
    SIGNALS,
    is_worker,
    worker_input,
)

#: exit code of a worker that wants to be replaced
REPLACE_ME = 86


class CaseGuard:
    """A plugin of the process that runs tests.

    Parameters
    ----------
    config
        pytest's configuration.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._folder: Path | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        box = worker_input(config).get("kv_box")
        config.stash[BOX] = BlackBox(None if box is None else Path(box))
        self._is_ready = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Around setup, call and teardown of a test."""
        self._leave_if_spent()
        self._config.stash[SIGNALS].check()
        case = case_of(self._config, item)
        if case is None:
            return (yield)
        if not self._is_ready:
            self._is_ready = True
            self._prepare()
        self._begin(case, item)
        try:
            return (yield)
        except BaseException:
            # a signal, or a hook or test of a user that calls pytest.exit: what is measured is kept
            reporter = self._config.stash.get(REPORTER, None)
            payload = payload_of(item)
            if reporter is not None and payload is not None and item.nodeid not in reporter.measured:
                with suppress(UserError):  # it ended the run, and was told
                    reporter.keep(payload)
            raise
        finally:
            self._config.stash[BOX].clear()

    def pytest_unconfigure(self) -> None:
        """Nobody is left to watch."""
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, case: Case, item: pytest.Item) -> None:
        box, options = self._config.stash[BOX], self._config.stash[OPTIONS].of(CommonOptions)
        if not box.is_read:
            return
        record = Record(
            case=case, id=item.nodeid, case_key=case.key(model_revision=None, dataset_revision=None), rounds=options.rounds,
            warmup=options.num_warmup, seed=options.seed, order_index=self._config.stash[PLACES].get(item.nodeid, 0),
            started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        environment: dict[str, Any] | None
        if RUNNER in self._config.stash:
            environment = self._config.stash[RUNNER].environment
        elif is_worker(self._config):
            environment = None
        else:
            # before the first case; the watchdog cannot ask
            from kvsuite.meters.environment import host_facts

            environment = host_facts()
        box.begin(**_known(self._config, record, environment))

    def _prepare(self) -> None:
        """Before the first case: see to it that this process, should it hang, is ended."""
        if is_worker(self._config):
            die_with_parent()
            return
        limit = self._config.stash[OPTIONS].of(SweepOptions).timeout
        if limit is None or not hasattr(signal, "SIGKILL") or CLUSTER in self._config.stash:
            return  # on a cluster a worker watches on its own host
        self._folder = Path(tempfile.mkdtemp(prefix="kvsuite-"))
        box = self._folder / "box.json"
        self._config.stash[BOX] = BlackBox(box)
        arguments = json.dumps({"box": str(box), "parent": os.getpid(), "limit_s": limit})
        self._watchdog = subprocess.Popen([sys.executable, "-m", "kvsuite.survival.watchdog", arguments])

    def _leave_if_spent(self) -> None:
        """A process that may answer wrongly runs no further case: a worker ends, and xdist starts another; a run ends."""
        runner = self._config.stash.get(RUNNER, None)
        if runner is None:
            return
        if not is_worker(self._config):
            if runner.spent:
                pytest.exit(
                    f"kvsuite: {runner.spent}; go on with --kv-resume=latest and a longer --kv-timeout, or with -n 1, "
                    "where the next case gets a new process",
                    returncode=pytest.ExitCode.INTERRUPTED,
                )
        elif runner.poisoned or runner.timed_out:
            _leave()


def tell_box(config: pytest.Config, record: Record, phase: str) -> None:
    """A phase of the running case begins; its time counts from the first one on."""
    config.stash[SIGNALS].check()
    box = config.stash[BOX]
    if not box.is_read:
        return
    news = _known(config, record, config.stash[RUNNER].environment)
    if phase == "load" or not box.is_open:
        # until now it was fixtures, which have as much time for themselves; or a test made its case by hand
        box.begin(**news)
    box.tell(phase=phase, **news)


def _known(config: pytest.Config, record: Record, environment: dict[str, Any] | None) -> dict[str, Any]:
    """What a box says of a case; where a watchdog reads it, with where the row goes."""
    note_place(config, record)
    if environment is not None:
        record.env = digest(environment)
    known: dict[str, Any] = {"row": record.to_dict(), "environment": environment}
    reporter = config.stash.get(REPORTER, None)
    return known if environment is None or reporter is None else known | reporter.destination(known["row"], environment)


def note_place(config: pytest.Config, record: Record) -> None:
    """Write into a record where its case stands in the space and how the run was rotated."""
    cases = [*config.stash[CASES]]
    key = record.case.suite, record.case.id
    record.case_index = cases.index(key) if key in cases else 0
    record.order_seed = config.stash[ORDER_SEED]


def payload_of(item: pytest.Item) -> dict[str, Any] | None:
    """What `kvsuite.plugin.reporter.Reporter.add` takes of a test, ``None`` if it measured no case."""
    measured = item.stash.get(MEASURED, None)
    if measured is None:
        return None
    environment = item.config.stash[RUNNER].environment
    return {"record": measured.record.to_dict(), "tokens": measured.tokens, "environment": environment}


def case_of(config: pytest.Config, item: pytest.Item) -> Case | None:
    """The case of a collected test, ``None`` if it has none."""
    name, suite = _parameters(item).get("kv_case"), suite_name(item)
    return config.stash[CASES].get((suite, name)) if isinstance(name, str) and suite is not None else None


def suite_name(item: pytest.Item) -> str | None:
    """The suite whose cases a collected test has, usable or not; ``None`` if it has none."""
    marker = item.get_closest_marker("kv_suite")
    return str(marker.args[0]) if marker and len(marker.args) == 1 and "kv_case" in _parameters(item) else None


def _parameters(item: pytest.Item) -> dict[str, Any]:
    found: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return found


def _leave() -> NoReturn:
    # what pytest and torch would do at exit may hang on a broken device
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(REPLACE_ME)
