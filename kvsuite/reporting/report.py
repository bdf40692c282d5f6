"""``report.json`` and the other files that are derived from records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.record import REPORT_SCHEMA, STATUSES, check_schema
from kvsuite.store.files import parse_json, write_atomic
from kvsuite.store.records_file import REPORT_FILE
from kvsuite.store.validate import validate
from kvsuite.suites.dse.files import dse_files, dse_sheets
from kvsuite.suites.dse.rows import DSE
from kvsuite.suites.perplexity.csv_files import csv_name, csv_rows, csv_text

from .aggregate import COMPRESSION, PERPLEXITY, Row, in_space_order


def assemble_report(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Build the report of a run.

    Parameters
    ----------
    run
        The run line; its ``environment`` moves to the report's top level.
    rows
        Record rows in run order, unknown fields included.

    Returns
    -------
    dict
        ``schema, run, environment, counts`` (by status), ``records``; valid against ``report.schema.json``.

    Raises
    ------
    UserError
        Naming the field that is missing or wrong.
    """
    counts = Counter(row.get("status") for row in rows)
    report = {
        "schema": REPORT_SCHEMA,
        "run": {key: item for key, item in run.items() if key != "environment"},
        "environment": run.get("environment"),
        "counts": {status: counts[status] for status in STATUSES},
        "records": [dict(row) for row in rows],
    }
    validate("report", report, f"report of run {run.get('run_id')!r}")
    return report


def write_outputs(
    folder: Path, run: Mapping[str, Any], rows: Sequence[Row], *, figures: bool = True, source: Path | None = None
) -> list[Path]:
    """Write everything derived from a run: the report, and the tables, files and figures of its suites.

    Nothing is written before everything is built, so a damaged run leaves older files alone. Rows come out in the order of
    the suite's space, whatever order they ran in. ``figures=False`` leaves the drawing to the caller, and
    the page that shows the figures. ``source`` is the run's own folder where ``folder`` is another one.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UserError
        If the report is not valid, or the folder holds a ``report.json`` of another schema or another run.
    """
    # valid before anything is asked of a row
    report = assemble_report(run, rows)
    rows = report["records"] = in_space_order(report["records"])
    files: dict[str, str | bytes] = {REPORT_FILE: _report_text(folder / REPORT_FILE, report)}
    if any(row["suite"] == COMPRESSION for row in rows):
        from kvsuite.suites.compression.results_json import results_json

        files["results.json"] = _json_text(results_json(run, rows), "results.json")
        if figures:
            from kvsuite.suites.compression.figure import render_benchmark_comparison

            files |= render_benchmark_comparison(run, rows)
    results = csv_rows(run, rows)
    if results:
        for dataset in dict.fromkeys(str(row["dataset"]) for row in results):
            files[csv_name(dataset)] = csv_text([row for row in results if row["dataset"] == dataset])
        if figures:
            from kvsuite.suites.perplexity.figure import render_perplexity

            files |= render_perplexity(results)
    files |= dse_files(run, rows)
    if figures and any(row["suite"] == DSE for row in rows):
        from kvsuite.suites.dse.figures.draw import render_dse

        files |= render_dse(dse_sheets(run, rows)).files
    if any(row["suite"] in (COMPRESSION, PERPLEXITY, DSE) for row in rows):
        from kvsuite.suites.compression.table import run_table

        files["table.txt"] = run_table(rows, run.get("cases"))
    if figures:
        from .page.render import PAGE_FILE, build_page

        files[PAGE_FILE] = build_page(folder, run, rows, files=files, source=source)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def _report_text(path: Path, report: dict[str, Any]) -> str:
    if path.exists():
        report = _keep_unknown_fields(path, report)
    return _json_text(report, str(path))


def _keep_unknown_fields(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    try:
        old = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is there but cannot be read as a report ({error}); move it away first") from error
    check_schema(old.get("schema") if isinstance(old, dict) else None, REPORT_SCHEMA, str(path))
    old_run, new_run = old.get("run", {}).get("run_id"), report["run"]["run_id"]
    if old_run != new_run:
        raise UserError(f"{path}: belongs to run {old_run!r}, not to {new_run!r}; give another folder with --out")
    return report | {key: item for key, item in old.items() if key not in report}


def _json_text(document: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise UserError(f"{where}: holds NaN or an infinity ({error}); write null with a reason instead") from error
