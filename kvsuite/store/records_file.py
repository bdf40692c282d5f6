"""Reading a run back: its ``records.jsonl``, whole or cut off, or its ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.record import RECORD_SCHEMA, REPORT_SCHEMA, RUN_SCHEMA, check_schema

from .files import parse_json
from .validate import validate

__all__ = ["RECORDS_FILE", "REPORT_FILE", "code_of", "read_records", "session_of", "whole_lines"]

RECORDS_FILE = "records.jsonl"
REPORT_FILE = "report.json"


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """Read a run back.

    Parameters
    ----------
    path
        A run folder, its ``records.jsonl`` or a ``report.json``.

    Returns
    -------
    run
        The run line, ``environment`` included. Where processes with other environments took part (a resumed run, a worker
        on another GPU), or other files of code, ``sessions`` lists them: ``started_utc, command, env, environment, code``.
    rows
        The record rows in run order; of rows with one id the last counts, in the first one's place.
    notes
        What was left out, in words.

    Raises
    ------
    UserError
        If the path is missing, damaged before its last line, or of another schema.
    """
    if path.is_dir():
        found = [path / name for name in (RECORDS_FILE, REPORT_FILE) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no {RECORDS_FILE} and no {REPORT_FILE} in it; give the folder of a kvsuite run")
        path = found[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a run folder, a {RECORDS_FILE} or a {REPORT_FILE}"
        ) from error
    notes: list[str] = []
    if path.suffix == ".json":
        run, rows = _read_report(path, data)
    else:
        run, rows = _read_lines(path, data, notes)
    by_id: dict[str, dict[str, Any]] = {}
    for row in rows:
        row_id = str(row.get("id"))
        if row_id in by_id:
            notes.append(f"{path}: {row_id} is there twice; the last one counts")
        by_id[row_id] = row
    return run, list(by_id.values()), notes


def whole_lines(data: bytes) -> bytes:
    """A file without what was being written when its process ended, or the power did: half a line, or blocks of zeros."""
    data = data.rstrip(b"\0")
    begun = data.rfind(b"\n") + 1
    try:
        complete = isinstance(parse_json(data[begun:]), dict)
    except ValueError:
        complete = False
    return data if complete else data[:begun]


def session_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_records` lists of a further run line."""
    return {name: line[name] for name in ("started_utc", "command", "env", "environment", "code") if name in line}


def code_of(run: Mapping[str, Any]) -> dict[str, str] | None:
    """Hashes of the code that measured a run, that of its sessions included; ``None`` if none were recorded."""
    known = [one["code"] for one in (run, *run.get("sessions", ())) if one.get("code") is not None]
    return {name: value for code in known for name, value in code.items()} if known else None


def _read_report(path: Path, data: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        report = parse_json(data)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); redraw it from its {RECORDS_FILE}") from error
    check_schema(report.get("schema") if isinstance(report, dict) else None, REPORT_SCHEMA, str(path))
    validate("report", report, str(path))
    return report["run"] | {"environment": report["environment"]}, report["records"]


def _read_lines(path: Path, data: bytes, notes: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = whole_lines(data)
    lines = [(number, line) for number, line in enumerate(whole.split(b"\n"), 1) if line.strip()]
    if len(whole) < len(data) and lines:
        number = whole.count(b"\n") + 1
        notes.append(f"{path}: line {number} is cut off and was left out: the run ended while writing it")
    run: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for place, (number, line) in enumerate(lines):
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is damaged ({error}); restore it, or delete the line and run its case again"
            ) from error
        if place and row.get("schema") == RUN_SCHEMA:
            validate("run", row, f"{path}: line {number}")
            run.setdefault("sessions", []).append(session_of(row))
            continue
        check_schema(row.get("schema"), RECORD_SCHEMA if place else RUN_SCHEMA, f"{path}: line {number}")
        if place:
            rows.append(row)
        else:
            run = row
    if not run:
        raise UserError(f"{path}: empty, not even the run line is there; run the benchmark again")
    return run, rows
