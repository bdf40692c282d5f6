"""The controller's side of xdist: a slot a worker, a row for the case of a dead one, an end for one that hangs."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvsuite.case import Case, digest
from kvsuite.distribution.order import session_key
from kvsuite.measure.deadline import is_overdue, killed
from kvsuite.options.sweep import SweepOptions
from kvsuite.survival.black_box import read_box
from kvsuite.survival.death import Cause, cause_of, crashed_row

from .case_watch import REPLACE_ME
from .reporter import Reporter
from .stash import FINISHED, OPTIONS, ORDER_SEED, UNASKED

_POLL_S = 0.2
_WAIT_S = 10.0


class WorkerGuard:
    """A plugin of xdist's controller.

    Parameters
    ----------
    config
        pytest's configuration.
    reporter
        Writes the rows.
    """

    def __init__(self, config: pytest.Config, reporter: Reporter) -> None:
        self._config = config
        self._reporter = reporter
        # made when cases were collected
        self._folder = Path(tempfile.gettempdir()) / f"kvsuite-{os.getpid()}-{secrets.token_hex(8)}"
        # by xdist's spec of a worker, which its replacement inherits
        self._slots: list[Any] = []
        self._cases: dict[str, Case] = {}
        self._killed: dict[str, str] = {}
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None

    # xdist's hooks

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker what all of them must do alike, and its slot."""
        spec = node.gateway.spec
        if not any(spec is known for known in self._slots):
            self._slots.append(spec)
        node.workerinput |= {
            "kv_order_seed": self._config.stash[ORDER_SEED],
            "kv_finished": [*self._config.stash[FINISHED]],
            # a worker on another host has no folder of ours
            "kv_box": str(self._box(node)) if spec.popen else None,
            "kv_slot": next(slot for slot, known in enumerate(self._slots) if spec is known),
        }

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Ours takes the place of ``--dist=load``, which -n means."""
        if config.getoption("dist") != "load":
            return None
        from kvsuite.distribution.scheduler import CaseScheduling

        return CaseScheduling(config, log, self)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """A worker died in a test: if it was a case, its row travels on the report that xdist made up."""
        node: Any = report.node
        entry = read_box(self._box(node))
        if entry is None or entry["id"] != crashitem or self.has_row(crashitem):
            return
        limit = self._config.stash[OPTIONS].of(SweepOptions).timeout
        timed_out = self._killed.get(node.gateway.id) == crashitem
        cause = Cause("Timeout", killed(limit)) if limit is not None and timed_out else cause_of(_returncode(node))
        row = crashed_row(entry, cause)
        environment = entry["environment"]
        if environment is None:
            # it died before it could look around
            from kvsuite.meters.environment import host_facts

            environment = host_facts()
            row["env"] = digest(environment)
        row["effective"] = row["effective"] | {"concurrent_workers": len(self._slots)}
        report.longrepr = f"crashed in {entry['phase']}: {cause.reason}"
        report.kvsuite = {"record": row, "tokens": None, "environment": environment}  # type: ignore[attr-defined]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """Say why a worker went that wanted to; take over what one that is done tells."""
        output = getattr(node, "workeroutput", {})
        if output.get("kv_left_out"):
            self._reporter.left_out = True
        if lines := output.get("kv_unasked"):
            # every worker collected the same
            self._config.stash[UNASKED] = lines
        if error is not None and _returncode(node) == REPLACE_ME:
            self._reporter.tell(
                f"kvsuite: worker {node.gateway.id} gets a new process: a CUDA error or a timeout left its old one in a state "
                "that is not known"
            )

    def pytest_sessionfinish(self) -> None:
        """Stop watching."""
        self._over.set()
        if self._watcher is not None:
            self._watcher.join()

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind."""
        self._over.set()
        shutil.rmtree(self._folder, ignore_errors=True)

    # what the plugin tells

    def expect(self, cases: Iterable[tuple[str, Case]]) -> None:
        """Cases were collected: from now on deaths are ordinary, and time is limited."""
        self._cases = dict(cases)
        self._folder.mkdir(mode=0o700)
        session: Any = self._config.pluginmanager.get_plugin("dsession")
        if session is not None and self._config.getoption("maxworkerrestart") is None:
            # by default four deaths a worker end a run, but each may cost one case of a long sweep
            session._max_worker_restart = max(session._max_worker_restart or 0, len(self._cases) + 4 * len(self._slots))
        limit = self._config.stash[OPTIONS].of(SweepOptions).timeout
        if limit is not None and self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, args=(limit,), name="kvsuite-timeouts", daemon=True)
            self._watcher.start()

    @property
    def is_expecting(self) -> bool:
        """Whether cases were collected already; the replacement of a worker collects them again."""
        return bool(self._cases)

    @property
    def workers(self) -> int:
        """How many there are at the same time."""
        return len(self._slots)

    # what the scheduler asks

    def session_of(self, node_id: str) -> Hashable | None:
        """What the case's model and weights are loaded for, ``None`` if it is no case."""
        case = self._cases.get(node_id)
        return None if case is None else session_key(case)

    def has_begun(self, node: Any, node_id: str) -> bool:
        """Whether a worker was running the case when it died."""
        # without a box (another host) nothing is known, and what comes first in its queue is taken for it
        if not node.gateway.spec.popen:
            return True
        entry = read_box(self._box(node))
        return entry is not None and entry["id"] == node_id

    def has_row(self, node_id: str) -> bool:
        """Whether this run wrote a row of the case."""
        return node_id in self._reporter.measured

    def _box(self, node: Any) -> Path:
        return self._folder / f"{node.gateway.id}.json"

    def _watch(self, limit_s: float) -> None:
        while not self._over.wait(_POLL_S):
            for path in self._folder.glob("*.json"):
                entry = read_box(path)
                if entry is not None and path.stem not in self._killed and is_overdue(entry, limit_s):
                    self._killed[path.stem] = entry["id"]
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(entry["pid"], signal.SIGKILL)


WORKERS: pytest.StashKey[WorkerGuard] = pytest.StashKey()


def _returncode(node: Any) -> int | None:
    """Exit status of a local worker whose pipe has closed; ``None`` for another one."""
    process: subprocess.Popen[bytes] | None = getattr(node.gateway._io, "popen", None)
    if process is None:
        return None
    try:
        return process.wait(timeout=_WAIT_S)
    except subprocess.TimeoutExpired:
        return None
