"""The controller's side: rows to disk the moment a case ends, derived files and the table at the end."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.case import Case, canonical_json
from kvsuite.distribution.alone import AloneTimes
from kvsuite.distribution.progress import Progress
from kvsuite.distribution.time_left import TimeLeft
from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.metrics.registry import metric_of
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.record import metric_value
from kvsuite.store.validate import validate
from kvsuite.suites.registry import asked, in_order, suite_of_rows

from .stash import BOX, ORDER_SEED, SIGNALS

if TYPE_CHECKING:
    from kvsuite.store.store import RecordStore
    from kvsuite.survival.resume import EarlierRun

#: of the line of a finished case
_MOST_NUMBERS = 4


class Reporter:
    """Receives the records of a run, in the one process that writes.

    Parameters
    ----------
    config
        pytest's configuration.
    options
        Resolved options.
    """

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._config = config
        self._options = options
        self._common = options.of(CommonOptions)
        self._started = datetime.now(UTC)
        self._store: RecordStore | None = None
        self._cases: int | None = None
        self._progress = Progress(self.tell, 1)
        self._left: TimeLeft | None = None
        self._code: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._earlier: EarlierRun | None = None
        self._alone = AloneTimes()
        #: ids of the cases that have a row of this session
        self.measured: set[str] = set()
        #: what was said of suites that could not take note of a row
        self._told: set[str] = set()
        #: whether selected cases were left out: another shard has them, or the run that goes on
        self.left_out = False
        self.rows: list[dict[str, Any]] = []
        self.run: dict[str, Any] = {}
        self.files: list[Path] = []
        self.page: Path | None = None
        self.failure: str | None = None
        #: seconds that the cases are expected to take, ``None`` where nothing tells
        self.expected_s: float | None = None

    @property
    def folder(self) -> Path | None:
        """The run's folder, ``None`` before the first record."""
        if self._store is None:
            return None if self._earlier is None else self._earlier.folder
        return self._store.folder

    @property
    def earlier(self) -> EarlierRun | None:
        """The run that this one goes on with."""
        return self._earlier

    def go_on(self, earlier: EarlierRun) -> None:
        """Take up an earlier run: new rows belong to it."""
        self._earlier = earlier
        self.run, self.rows = dict(earlier.run), list(earlier.rows)
        self._places = {row["id"]: place for place, row in enumerate(self.rows)}

    def expect(self, selected: Sequence[tuple[str, Case]], ids: Sequence[str]) -> None:
        """``selected`` were collected: find out before anything is measured whether the report folder can take their files.

        Parameters
        ----------
        selected
            Node ids and cases of what is to be measured.
        ids
            Node ids of the cases and of other tests.

        Raises
        ------
        UserError
            Naming ``--kv-report-dir`` or the file in the way, and the mend; or in what this run differs from the one that it
            goes on with.
        """
        from kvsuite.measure.source_hash import code_hashes
        from kvsuite.store.records_file import code_of

        cases = [case for _, case in selected]
        then = {} if self._earlier is None else code_of(self._earlier.run) or {}
        self._code = code_hashes(self._config.rootpath, ids, then, cases=cases)
        if self._earlier is not None:
            from kvsuite.meters.environment import host_facts

            known = self._config.hook.pytest_kvsuite_metrics(config=self._config)
            # of a cluster the nodes are asked, not this host
            here = {} if self._options.of(SweepOptions).cluster else {"environment": host_facts()}
            self._earlier.require_same(
                {"options": self._options.to_dict(), "code": self._code} | here,
                {metric.name: metric.version for metrics in known for metric in metrics},
            )
            self._earlier.require_same_plans(selected)
        if not cases:
            return
        self._cases = len(cases)
        self._left = self._time_left(cases)
        self._progress = Progress(self.tell, len(cases), self._left)
        base = Path(self._common.report_dir)
        probe = base / ".kvsuite-probe"
        try:
            base.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--kv-report-dir={base}: cannot write there ({error.strerror}); choose a folder you may write to"
            ) from error
        for suite in in_order(suite_of_rows(name) for name in {case.suite for case in cases}):
            own = [case for case in cases if case.suite == suite.name]
            asked(suite, partial(suite.check_gathered, base, own), "check_gathered()")
        if self._earlier is not None:
            # and whether another process still writes that run
            self._store = self._reopened(self._earlier)

    def _time_left(self, cases: Sequence[Case]) -> TimeLeft | None:
        from kvsuite.distribution.plan import measured_cases, plan
        from kvsuite.distribution.recorded import last_runs

        runs = self._alone.seen(last_runs(Path(self._common.report_dir)))
        try:
            planned = plan(cases, self._options, measured_cases(runs, self._options))
        except Exception as error:  # an estimate ends no run: a suite of somebody else may not count its cases
            self._write(f"kvsuite: how long the cases take is not known: {type(error).__name__}: {error}")
            return None
        left = TimeLeft(planned, int(self._config.getoption("numprocesses", default=None) or 1))
        self.expected_s = left.seconds
        return left

    def note_workers(self, workers: int) -> None:
        """So many cases run at the same time: what is left takes as long."""
        if self._left is not None:
            self._left.workers = workers

    @property
    def seconds_left(self) -> float | None:
        """Of the cases that have no row; ``None`` where nothing tells."""
        return None if self._left is None else self._left.seconds

    def counts(self) -> Counter[str]:
        """Finished cases by status, those of the run that goes on included."""
        kept = set() if self._earlier is None else {row["id"] for row in self._earlier.kept}
        return Counter(row["status"] for row in self.rows if row["id"] in self.measured or row["id"] in kept)

    def phases(self, case: Case) -> Any:
        """Progress callback for the phases of ``case``."""
        self._progress.case(case.name)
        return self._progress.phase

    # first, so that what ends the run is told once and not as a failed test as well
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a report carries, from this process or from a worker of xdist."""
        usage_error = getattr(report, "kvsuite_usage_error", None)
        payload = getattr(report, "kvsuite", None)
        try:
            if payload is not None:
                self.keep(payload)
        except UserError as error:
            usage_error = str(error)
        if usage_error is not None:
            pytest.exit(f"kvsuite: {usage_error}", returncode=pytest.ExitCode.USAGE_ERROR)

    def opening(self, row: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
        """What starts the files of a run whose first row this is: arguments of `kvsuite.store.store.open_run`."""
        return {
            "method": suite_of_rows(row["suite"]).run_name(self._options),
            "model": row["model"].get("label") or _model_label(row["case"]["model"]),
            "facts": self._facts(environment),
        }

    def _facts(self, environment: dict[str, Any]) -> dict[str, Any]:
        return {
            "command": environment["command"],
            "options": self._options.to_dict(),
            "environment": environment,
            "seed": self._common.seed,
            "order_seed": self._config.stash[ORDER_SEED],
            "cases": self._cases,
            "code": self._code,
        }

    def destination(self, row: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
        """Where a row goes that another process has to write for this one: JSON types."""
        if self.folder is not None:
            return {"folder": str(self.folder.absolute()), "opening": {"facts": self._facts(environment)}}
        base = str(Path(self._common.report_dir).absolute())
        place = {"base": base, "started": self._started.isoformat()}
        return {"folder": None, "opening": place | self.opening(row, environment)}

    def keep(self, payload: dict[str, Any]) -> None:
        """`add`, which no signal cuts off: the row is in the file and in the report, or in neither."""
        with self._config.stash[SIGNALS].held():
            self.add(payload)

    def add(self, payload: dict[str, Any]) -> None:
        """Write one case's row (and its raw tokens) and say so."""
        row, environment = payload["record"], payload["environment"]
        if self._earlier is not None:
            self._earlier.require_same_case(row, environment)
        if (disturbed := self._alone.warning(row)) is not None:
            row["warnings"].append(disturbed)
        store = self._open(row, environment)
        store.require_in_place()
        if payload["tokens"]:
            row["sidecar"] = store.write_sidecar(row["id"], payload["tokens"])
        store.append(row)
        self._config.stash[BOX].written()
        self.measured.add(row["id"])
        place = self._places.setdefault(row["id"], len(self.rows))
        self.rows[place : place + 1] = [row]
        self._progress.case(row["case"]["name"])
        self._progress.finished(_summary(row), row)
        self._tell_suite(str(row["suite"]))

    def _tell_suite(self, name: str) -> None:
        """Let the suite of a row write what it keeps up to date while a run goes on."""
        from kvsuite.reporting.aggregate import in_space_order
        from kvsuite.suites.registry import suite_of_rows
        from kvsuite.suites.suite import Suite

        suite = suite_of_rows(name)
        if type(suite).case_done is Suite.case_done:
            return
        own = in_space_order([row for row in self.rows if row["suite"] == name])
        try:
            suite.case_done(self._options, self.run, own)
        except Exception as error:  # suites are others' too, and a row that is written is safe
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            if what not in self._told:
                self._told.add(what)
                self._write(f"kvsuite: {name}: {what}")

    def _open(self, row: dict[str, Any], environment: dict[str, Any]) -> RecordStore:
        """The store, which knows the environment of the row that comes next."""
        from kvsuite.store.records_file import read_records
        from kvsuite.store.store import open_run

        if self._store is None and self._earlier is not None:
            self._store = self._reopened(self._earlier)
        elif self._store is None:
            base = Path(self._common.report_dir)
            self._store = open_run(base, started=self._started, **self.opening(row, environment))
            self.run = read_records(self._store.folder)[0]
        self.run = self._store.with_session(self.run, self._facts(environment))
        return self._store

    @staticmethod
    def _reopened(earlier: EarlierRun) -> RecordStore:
        from kvsuite.store.store import RecordStore

        return RecordStore.reopen(earlier.folder)

    def finish(self) -> None:
        """Write the derived files; a failure there is told, the rows are safe."""
        from kvsuite.reporting.aggregate import in_space_order
        from kvsuite.reporting.page.render import write_page
        from kvsuite.store.records_file import RECORDS_FILE
        from kvsuite.suites.outputs import by_suite, write_outputs

        folder = self.folder
        if self._store is not None:
            try:
                self._store.require_in_place()
            except UserError as error:
                # there is no place for a report; what was measured is shown
                self.failure = str(error)
            self._store.close()
        if folder is None or not (self.measured or self.left_out):
            # nothing was measured, and the run that might have gone on is as it was
            self.rows = []
            return
        self.rows = [dict(row) for row in in_space_order(self.rows)]
        if self.failure:
            return
        hook = self._config.hook
        failures = self._let_hooks_change()
        try:
            self.files = write_outputs(folder, self.run, self.rows, figures=False)
            for suite, own in by_suite(self.rows):
                self.files += suite.gather(Path(self._common.report_dir), self.run, own)
            for paths in hook.pytest_kvsuite_figures(config=self._config, run=self.run, rows=self.rows, folder=folder):
                self.files += list(paths)
            self.page = write_page(folder, self.run, self.rows)
            self.files.append(self.page)
        except Exception as error:  # hooks of users are among what may fail
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failures.append(
                f"{what}; the records are safe in {folder / RECORDS_FILE}, redraw with python -m kvsuite report"
            )
        self.failure = "; ".join(failures) or None

    def _let_hooks_change(self) -> list[str]:
        """Let the hooks of users change run and rows; what cannot be written then is undone, and told."""
        hook = self._config.hook.pytest_kvsuite_update_report
        if not hook.get_hookimpls():
            return []
        before = copy.deepcopy((self.run, self.rows))
        try:
            hook(config=self._config, run=self.run, rows=self.rows)
            canonical_json([self.run, self.rows])
            for row in self.rows:
                validate("record", row, str(row.get("id")))
        except Exception as error:
            self.run, self.rows = before
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return [f"pytest_kvsuite_update_report: {what}; the report is that of the records"]
        return []

    @property
    def is_kept(self) -> bool:
        """Whether there is a run folder: none before the first row, and somebody may delete it."""
        return self.folder is not None and self.folder.is_dir()

    @property
    def cases_left(self) -> int:
        """Cases that were to be measured and have no row."""
        return 0 if self._cases is None else self._cases - len(self.measured)

    @property
    def kept_failures(self) -> int:
        """Failed cases of the earlier run that were not measured again."""
        failed = ("oom", "error", "crashed")
        return sum(row["status"] in failed and row["id"] not in self.measured for row in self.rows)

    @property
    def nothing_ran(self) -> str | None:
        """The reason, if cases were selected and not one could run."""
        # what is the same as a case of another shard has nothing to run
        if (
            self._options.of(SweepOptions).shard is not None
            or not self.rows
            or any(row["status"] not in ("skipped", "invalid") for row in self.rows)
        ):
            return None
        return str(self.rows[0]["reason"])

    def tell(self, line: str) -> None:
        """Print a line among those of the cases."""
        self._write(line)

    def shows(self, line: str) -> bool:
        """As `tell`; ``False`` where ``-q`` keeps the line back."""
        return self._write(line)

    def _write(self, line: str) -> bool:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or self._config.getoption("verbose") < 0:
            return False
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if capture is None:
            terminal.ensure_newline()
            terminal.write_line(visible(line))
            return True
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(visible(line))
        return True


REPORTER: pytest.StashKey[Reporter] = pytest.StashKey()


def _summary(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        error = row["error"] or {}
        return f"{row['status']}: {row['reason'] or error.get('message')}"
    shown = []
    for name in suite_of_rows(row["suite"]).headline[:_MOST_NUMBERS] or list(row["metrics"])[:_MOST_NUMBERS]:
        value = metric_value(row, name)
        if value is not None:
            shown.append(metric_of(name, row["metrics"].get(name)).line(value))
    # where rounds scatter so much that their differences mean nothing; the row's warning has the figures
    unstable = any(str(warning).startswith("unstable: ") for warning in row["warnings"])
    return ", ".join(shown) + (" (unstable times)" if unstable else "")


def _model_label(request: str) -> str:
    """Label of a model that was never loaded: the one it would have had, so that its folders are found together."""
    from kvsuite.models.resolve import resolve_model

    try:
        return resolve_model(request).label
    except UserError:
        return request
