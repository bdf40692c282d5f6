"""Files of the pipeline suite in a run's folder: the original's JSON list, the same rows as a CSV, a controller's decisions."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsuite.case import canonical_json
from kvsuite.errors import UserError
from kvsuite.foreign_text import csv_cell
from kvsuite.reporting.aggregate import Row
from kvsuite.store.files import write_atomic

from .results_json import RESULTS_FILE, results_json

CSV_FILE = "pipeline_results.csv"
#: what ``--kv-replay-decisions`` reads: the log of each case's first round by its name, where there was a controller
DECISIONS_FILE = "pipeline_decisions.json"


def pipeline_files(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """The files by name; the CSV's columns are the keys of the list, in the order in which rows have them."""
    found = results_json(run, rows)
    names = list(dict.fromkeys(name for one in found for name in one))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in one.items()} for one in found)
    files = {RESULTS_FILE: results_text(found), CSV_FILE: buffer.getvalue()}
    logs = {row["case"]["name"]: row["samples"]["decisions"] for row in rows if row["samples"].get("decisions")}
    return files | ({DECISIONS_FILE: json.dumps(logs, indent=1) + "\n"} if logs else {})


def results_text(found: Sequence[Mapping[str, Any]]) -> str:
    """The JSON list as it stands in a file.

    Raises
    ------
    UserError
        If it holds NaN or an infinity.
    """
    try:
        return json.dumps(list(found), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise UserError(
            f"{RESULTS_FILE}: holds NaN or an infinity ({error}); write null with a reason instead"
        ) from error


def check_list(path: str | None) -> None:
    """Find out before anything is measured whether the file of ``--kv-pipeline-json`` can be written.

    Raises
    ------
    UserError
        If it is a folder, or there is no folder to write it to.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise UserError(f"--kv-pipeline-json={path}: is a folder; name a file in it")
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--kv-pipeline-json={path}: no folder to write to; make {folder} first")


def write_list(path: str | None, run: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the list of the cases so far, whole or not at all.

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    if path is None:
        return
    try:
        write_atomic(Path(path), results_text(results_json(run, rows)))
    except UserError as error:
        raise UserError(f"--kv-pipeline-json: {error}") from error


def _cell(value: Any) -> Any:
    return csv_cell(canonical_json(value) if isinstance(value, dict | list) else value)
