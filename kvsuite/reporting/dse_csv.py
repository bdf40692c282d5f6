"""``kv_cache_dse_results_<tag>.csv`` and ``kv_cache_dse_metrics_<tag>.csv``: read, append. Reads the original's files too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError

from .dse_columns import (
    METRICS,
    RESULTS,
    TABLES,
    Table,
    format_field,
    header_fault,
    model_tag,
    parse_field,
    series_tag,
    table_of,
)
from .files import write_atomic

__all__ = [
    "METRICS", "RESULTS", "Sheet", "Table", "append_rows", "check_appendable", "csv_text", "file_name", "model_tag",
    "read_sheet", "series_tag", "tag_of",
]  # fmt: skip

_LOCK = ".kv_cache_dse.lock"
_LOCK_TIMEOUT_S = 60.0

CsvRow = Mapping[str, Any]


@dataclass(frozen=True)
class Sheet:
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


def read_sheet(path: Path) -> Sheet:
    """Read the original program's CSV or ours, columns in any order, columns of others ignored with a note.

    Raises
    ------
    UserError
        Naming the file, and the line and the column that cannot be read.
    """
    return _parse(_read(path), str(path), tag_of(path))


def csv_text(table: Table, rows: Sequence[CsvRow], *, header: bool = True) -> str:
    """``rows`` with all columns of ``table`` as lines; ``None`` is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, table.columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({name: format_field(name, row[name]) for name in table.columns} for row in rows)
    return buffer.getvalue()


def check_appendable(folder: Path, table: Table, tags: Iterable[str]) -> None:
    """Find out before anything is measured whether rows can be appended to the files of these tags; they may be missing.

    Raises
    ------
    UserError
        If one of them has another header than kvsuite's, or a line that cannot be read.
    """
    for tag in tags:
        path = folder / file_name(table, tag)
        if path.exists():
            _appendable(path, table)


def append_rows(folder: Path, table: Table, rows: Sequence[CsvRow]) -> list[Path]:
    """Append ``rows`` to the files of their models and weight formats in ``folder``.

    A row that its file already has (same run, case, run number and metric) is left out. No file grows before all of them were
    checked. Each is written once and replaced by rename, so no reader sees half a row; writers wait for each other at a lock
    file.

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
        _check_row(table, row)
        tag = series_tag(str(row["model"]), row["quantization"])
        added.setdefault(folder / file_name(table, tag), []).append(row)
    if not added:
        return []
    with _alone_in(folder):
        grown = {path: text for path, new in added.items() if (text := _grown(path, table, new))}
        for path, text in grown.items():
            write_atomic(path, text)
    return list(grown)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    # one lock for all files of a folder: they are checked together
    lock = FileLock(folder / _LOCK, timeout=_LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder / _LOCK}: another process has held it for {_LOCK_TIMEOUT_S:.0f} s; end that process, or give another "
            "folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder / _LOCK}: cannot be locked ({reason}); give a folder that can be written") from error
    try:
        yield
    finally:
        lock.release()


def _grown(path: Path, table: Table, rows: Sequence[CsvRow]) -> str | None:
    """The file's text with the rows that it lacks, ``None`` if it lacks none."""
    before, present = _appendable(path, table) if path.exists() else ("", [])
    known = {_identity(row) for row in present}
    new = []
    for row in rows:
        identity = _identity(row)
        if None in identity[:2] or identity not in known:
            new.append(row)
        known.add(identity)
    if not new:
        return None
    return before + ("" if before.endswith("\n") or not before else "\n") + csv_text(table, new, header=not before)


def _identity(row: CsvRow) -> tuple[Any, ...]:
    return row["kvsuite_run_id"], row["case_key"], row.get("run_id"), row.get("metric_name")


def _appendable(path: Path, table: Table) -> tuple[str, list[dict[str, Any]]]:
    text = _read(path)
    if not text:
        return text, []
    header = _lines(text, str(path))[0][1]
    if header != list(table.columns):
        fault = header_fault(header) or "lacks columns, has others, or has them in another order"
        raise UserError(
            f"{path}: its header is not the one that kvsuite writes ({fault}), so no row is added; "
            "move the file away or give another folder"
        )
    return text, _parse(text, str(path), "").rows


def _check_row(table: Table, row: CsvRow) -> None:
    if set(row) != set(table.columns):
        raise ValueError(f"columns differ: {sorted(set(row) ^ set(table.columns))}")
    # what is written must come back, or a later reader refuses the whole file
    try:
        (again,) = _parse(_decoded(csv_text(table, [row]).encode()), "the row", "").rows
    except UserError as error:
        raise ValueError(f"could not be read again: {error}") from error
    differing = [name for name in table.columns if (again[name] or None) != (row[name] or None)]
    if differing:
        raise ValueError(f"cannot be written to a CSV: {', '.join(f'{name}={row[name]!r}' for name in differing)}")


def _read(path: Path) -> str:
    try:
        return _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); give a design-space CSV") from error


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def _parse(text: str, where: str, tag: str) -> Sheet:
    (_, header), *lines = _lines(text, where)
    table = table_of(header)
    if (fault := header_fault(header)) or table is None:
        raise UserError(f"{where}: {fault}; mend its header, or give a CSV of kvsuite or of the original program")
    foreign = [name for name in header if name not in table.columns]
    rows, without_number = [], 0
    for number, fields in lines:
        if not fields:
            continue
        if len(fields) != len(header):
            s = "" if len(fields) == 1 else "s"
            raise UserError(f"{where}: line {number} has {len(fields)} field{s}, {len(header)} are needed; mend it")
        found = dict.fromkeys(table.columns) | dict(zip(header, fields, strict=True))
        row: dict[str, Any] = {}
        for name in table.columns:
            try:
                row[name] = parse_field(table, name, found[name] or "")
            except ValueError as error:
                raise UserError(f"{where}: line {number} is not a result ({error}); mend or remove it") from error
        without_number += table is METRICS and row["metric_value"] is None
        rows.append(row)
    notes = []
    if foreign:
        notes.append(f"{where}: the column{'s' if len(foreign) > 1 else ''} {', '.join(map(repr, foreign))} ignored")
    if without_number:
        s = "" if without_number == 1 else "s"
        notes.append(f"{where}: {without_number} metric value{s} without a finite number left out")
    return Sheet(table, tag, where, rows, tuple(notes))


def _lines(text: str, where: str) -> list[tuple[int, list[str]]]:
    """The number of its last line and the fields of each row; a header without fields where there is nothing."""
    # strict: an open quote would swallow the rows that are appended
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, fields) for fields in reader] or [(0, [])]
    except csv.Error as error:
        raise UserError(
            f"{where}: line {reader.line_num} cannot be read as CSV ({error}); mend or remove it"
        ) from error
