"""The files of the design-space suite: two CSVs for every model and weight format of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsuite.reporting.aggregate import Row

from .csv_files import METRICS, RESULTS, CsvSheet, Table, append_rows, check_appendable, csv_text, file_name, series_tag
from .rows import csv_rows, metric_rows


def dse_sheets(run: Mapping[str, Any], rows: Sequence[Row]) -> list[CsvSheet]:
    """The results and the metrics of a run as they stand in its CSVs, those of each model and weight format apart."""
    return [
        CsvSheet(table, tag, file_name(table, tag), found)
        for table, of_table in _tables(run, rows)
        for tag, found in _by_tag(of_table).items()
    ]


def dse_files(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """The CSVs of a run by file name; none where it has no case of the suite."""
    return {sheet.source: csv_text(sheet.table, sheet.rows) for sheet in dse_sheets(run, rows)}


def append_dse(folder: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Append a run's rows to the CSVs in ``folder``, which gather many runs; return the files that grew.

    Raises
    ------
    UserError
        If a file there has another header, or cannot be read or written.
    """
    return [path for table, found in _tables(run, rows) for path in append_rows(folder, table, found)]


def check_dse(folder: Path, series: Sequence[tuple[str, str | None]]) -> None:
    """Find out before anything is measured whether rows of these models and weight formats can be appended in ``folder``.

    Raises
    ------
    UserError
        If a file there has another header, or a line that cannot be read.
    """
    tags = list(dict.fromkeys(series_tag(model, quantization) for model, quantization in series))
    for table in (RESULTS, METRICS):
        check_appendable(folder, table, tags)


def _tables(run: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[Table, list[dict[str, Any]]]]:
    return [(RESULTS, csv_rows(run, rows)), (METRICS, metric_rows(run, rows))]


def _by_tag(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(series_tag(str(row["model"]), row["quantization"]), []).append(row)
    return found
