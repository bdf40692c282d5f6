"""``kv_cache_dse_results_<tag>.csv`` and ``kv_cache_dse_metrics_<tag>.csv``: read, append. Reads the original's files too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.reporting.gathered_csv import CsvRow, GatheredCsv, cut_note, lines_of, read_text, records_of

from .columns import (
    METRICS,
    RESULTS,
    TABLES,
    Table,
    format_field,
    header_fault,
    parse_field,
    series_tag,
    table_of,
)

__all__ = [
    "METRICS", "RESULTS", "CsvSheet", "Table", "append_rows", "check_appendable", "csv_text", "file_name",
    "read_sheet", "series_tag", "tag_of",
]  # fmt: skip


@dataclass(frozen=True)
class CsvSheet:
    """A file that was read.

    Parameters
    ----------
    table
        Which of the two it is.
    tag
        From its name.
    source
        Its path as given, for messages and figures.
    rows
        With all columns of the table, numbers as numbers, ``None`` for what the file does not say.
    notes
        What a reader of a figure must know about the file.
    """

    table: Table
    tag: str
    source: str
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


def file_name(table: Table, tag: str) -> str:
    """``kv_cache_dse_results_<tag>.csv``."""
    return f"{table.prefix}{tag}.csv"


def tag_of(path: Path) -> str:
    """The tag in a file's name; the whole stem where there is no known prefix."""
    for table in TABLES:
        if path.stem.startswith(table.prefix):
            return path.stem.removeprefix(table.prefix)
    return path.stem


def read_sheet(path: Path) -> CsvSheet:
    """Read the original program's CSV or ours, columns in any order, columns of others ignored with a note.

    Raises
    ------
    UserError
        Naming the file, and the line and the column that cannot be read.
    """
    return _parse(read_text(path, "design-space"), str(path), tag_of(path))


def csv_text(table: Table, rows: Sequence[CsvRow], *, header: bool = True) -> str:
    """``rows`` with all columns of ``table`` as lines; ``None`` is an empty field."""
    return _FILES[table].text(rows, header=header)


def check_appendable(folder: Path, table: Table, tags: Iterable[str]) -> None:
    """Find out before anything is measured whether rows can be appended to the files of these tags; they may be missing.

    Raises
    ------
    UserError
        If one of them has another header than kvsuite's, or a line that cannot be read.
    """
    for tag in tags:
        _FILES[table].check_appendable(folder / file_name(table, tag))


def append_rows(folder: Path, table: Table, rows: Sequence[CsvRow]) -> list[Path]:
    """Append ``rows`` to the files of their models and weight formats in ``folder``, as `GatheredCsv.append` does.

    A row that its file already has (same run, case, run number and metric) is left out.

    Parameters
    ----------
    folder
        Exists.
    table
        Of all ``rows``.
    rows
        With all columns of the table; ``None`` becomes an empty field.

    Returns
    -------
    list[Path]
        The files that grew.

    Raises
    ------
    UserError
        If a file has another header, or cannot be read or written.
    ValueError
        If a row has other columns, or a value that `read_sheet` would not give back.
    """
    added: dict[Path, list[CsvRow]] = {}
    for row in rows:
        _FILES[table].check_row({name: None if value in ("", {}) else value for name, value in row.items()})
        tag = series_tag(str(row["model"]), row["quantization"])
        added.setdefault(folder / file_name(table, tag), []).append(row)
    return _FILES[table].append(folder, added)


def _parse(text: str, where: str, tag: str) -> CsvSheet:
    lines = lines_of(text, where)
    header = lines[0][1]
    table = table_of(header)
    if (fault := header_fault(header)) or table is None:
        raise UserError(f"{where}: {fault}; mend its header, or give a CSV of kvsuite or of the original program")
    foreign = [name for name in header if name not in table.columns]
    rows, without_number = [], 0
    for number, fields in records_of(lines, where):
        found = dict.fromkeys(table.columns) | dict(zip(header, fields, strict=True))
        row: dict[str, Any] = {}
        for name in table.columns:
            try:
                row[name] = parse_field(table, name, found[name] or "")
            except ValueError as error:
                raise UserError(f"{where}: line {number} is not a result ({error}); mend or remove it") from error
        without_number += table is METRICS and row["metric_value"] is None
        rows.append(row)
    notes = [note] if (note := cut_note(text, where)) else []
    if foreign:
        notes.append(f"{where}: the column{'s' if len(foreign) > 1 else ''} {', '.join(map(repr, foreign))} ignored")
    if without_number:
        s = "" if without_number == 1 else "s"
        notes.append(f"{where}: {without_number} metric value{s} without a finite number left out")
    return CsvSheet(table, tag, where, rows, tuple(notes))


def _rows(text: str, where: str) -> list[dict[str, Any]]:
    return _parse(text, where, "").rows


def _identity(row: CsvRow) -> tuple[Any, ...] | None:
    run, key = row["kvsuite_run_id"], row["case_key"]
    return None if run is None or key is None else (run, key, row.get("run_id"), row.get("metric_name"))


_FILES = {
    table: GatheredCsv(
        "design-space", table.columns, ".kv_cache_dse.lock", header_fault, format_field, _rows, _identity
    )
    for table in TABLES
}
