"""``report.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.record import REPORT_SCHEMA, STATUSES, check_schema
from kvsuite.store.files import parse_json
from kvsuite.store.validate import validate

from .aggregate import Row, json_bytes


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


def report_bytes(path: Path, report: Mapping[str, Any]) -> bytes:
    """The content of ``report.json`` at ``path``: fields that a reader added to the one that lies there are kept.

    Raises
    ------
    UserError
        If the report holds NaN, or the folder a ``report.json`` of another schema or another run.
    """
    if path.exists():
        report = _keep_unknown_fields(path, report)
    return json_bytes(report, str(path))


def _keep_unknown_fields(path: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    try:
        old = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is there but cannot be read as a report ({error}); move it away first") from error
    check_schema(old.get("schema") if isinstance(old, dict) else None, REPORT_SCHEMA, str(path))
    old_run, new_run = old.get("run", {}).get("run_id"), report["run"]["run_id"]
    if old_run != new_run:
        raise UserError(f"{path}: belongs to run {old_run!r}, not to {new_run!r}; give another folder with --out")
    return {**report, **{key: item for key, item in old.items() if key not in report}}
