"""The controller's side: rows to disk the moment a case ends, derived files and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .case import Case
from .errors import UserError
from .options import Options
from .progress import Progress
from .record import metric_value
from .spaces.registry import RUN_NAMES

if TYPE_CHECKING:
    from .reporting.store import RecordStore


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
        self._started = datetime.now(UTC)
        self._store: RecordStore | None = None
        self._cases: int | None = None
        self._progress = Progress(self._write, 1)
        self.rows: list[dict[str, Any]] = []
        self.run: dict[str, Any] = {}
        self.files: list[Path] = []
        self.page: Path | None = None
        self.failure: str | None = None

    @property
    def folder(self) -> Path | None:
        """The run's folder, ``None`` before the first record."""
        return None if self._store is None else self._store.folder

    def expect(self, cases: Sequence[Case]) -> None:
        """``cases`` were collected: find out before anything is measured whether the report folder can take their files.

        Raises
        ------
        UserError
            Naming ``--kv-report-dir`` or the file in the way, and the mend.
        """
        self._cases = len(cases)
        self._progress = Progress(self._write, len(cases))
        base = Path(self._options.report_dir)
        probe = base / ".kvsuite-probe"
        try:
            base.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--kv-report-dir={base}: cannot write there ({error.strerror}); choose a folder you may write to"
            ) from error
        points = [(case.model, case.quantization) for case in cases if case.suite == "dse"]
        if points:
            from .reporting.dse_files import check_dse

            check_dse(base, points)
        datasets = {str(case.workload["dataset"]) for case in cases if "dataset" in case.workload}
        if datasets:
            from .reporting.perplexity_csv import check_results

            check_results(base, datasets)

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
                self.add(payload)
        except UserError as error:
            usage_error = str(error)
        if usage_error is not None:
            pytest.exit(f"kvsuite: {usage_error}", returncode=pytest.ExitCode.USAGE_ERROR)

    def add(self, payload: dict[str, Any]) -> None:
        """Write one case's row (and its raw tokens) and say so."""
        from .reporting.store import RecordStore, create_run_folder, read_records

        row = payload["record"]
        if self._store is None:
            name_run = RUN_NAMES.get(row["suite"])
            method = name_run(self._options) if name_run else row["suite"]
            label = row["model"].get("label") or _model_label(row["case"]["model"])
            folder = create_run_folder(
                Path(self._options.report_dir), method=method, model=label, started=self._started
            )
            facts = {
                "run_id": folder.name,
                "method": method,
                "model": label,
                "started_utc": self._started.isoformat(timespec="seconds"),
                "command": payload["environment"]["command"],
                "options": self._options.to_dict(),
                "environment": payload["environment"],
                "seed": self._options.seed,
                "cases": self._cases,
            }
            self._store = RecordStore.create(folder, facts)
            self.run = read_records(folder)[0]
        if payload["tokens"]:
            row["sidecar"] = self._store.write_sidecar(row["id"], payload["tokens"])
        self._store.append(row)
        self.rows.append(row)
        self._progress.case(row["case"]["name"])
        self._progress.finished(_summary(row))

    def finish(self) -> None:
        """Write the derived files; a failure there is told, the rows are safe."""
        from .reporting.aggregate import in_space_order
        from .reporting.dse_files import append_dse
        from .reporting.page.render import write_page
        from .reporting.perplexity_csv import append_results, csv_rows
        from .reporting.report import write_outputs

        if self._store is None:
            return
        self._store.close()
        self.rows = [dict(row) for row in in_space_order(self.rows)]
        hook = self._config.hook
        try:
            hook.pytest_kvsuite_update_report(config=self._config, run=self.run, rows=self.rows)
            self.files = write_outputs(self._store.folder, self.run, self.rows, figures=False)
            self.files += append_results(Path(self._options.report_dir), csv_rows(self.run, self.rows))
            self.files += append_dse(Path(self._options.report_dir), self.run, self.rows)
            for paths in hook.pytest_kvsuite_figures(
                config=self._config, run=self.run, rows=self.rows, folder=self._store.folder
            ):
                self.files += list(paths)
            self.page = write_page(self._store.folder, self.run, self.rows)
            self.files.append(self.page)
        except Exception as error:  # hooks of users are among what may fail
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.failure = f"{what}; the records are safe in {self._store.path}, redraw with python -m kvsuite report"

    @property
    def nothing_ran(self) -> str | None:
        """The reason, if cases were selected and not one could run."""
        if not self.rows or any(row["status"] not in ("skipped", "invalid") for row in self.rows):
            return None
        return str(self.rows[0]["reason"])

    def _write(self, line: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or self._config.getoption("verbose") < 0:
            return
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if capture is None:
            terminal.ensure_newline()
            terminal.write_line(line)
            return
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line)


def _summary(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        error = row["error"] or {}
        return f"{row['status']}: {row['reason'] or error.get('message')}"
    parts = []
    for name, label, scale, unit in (
        ("perplexity", "PPL", 1.0, ""),
        ("ttft_s", "TTFT", 1e3, " ms"),
        ("tpot_s", "TPOT", 1e3, " ms"),
        ("kv_bytes_exact", "KV", 2**-20, " MiB"),
    ):
        value = metric_value(row, name)
        if value is not None:
            parts.append(f"{label} {value * scale:.2f}{unit}")
    return ", ".join(parts)


def _model_label(request: str) -> str:
    """Label of a model that was never loaded: the one it would have had, so that its folders are found together."""
    from .models.resolve import resolve_model

    try:
        return resolve_model(request).label
    except UserError:
        return request
