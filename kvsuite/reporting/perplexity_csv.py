"""``<dataset>_ppl_results.csv``: the original's columns first, then what they left out. Reads both kinds of file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvsuite.case import id_token
from kvsuite.errors import UserError

from .files import write_atomic
from .perplexity_columns import COLUMNS, ORIGINAL_COLUMNS, SCHEMA_VERSION, format_field, header_fault, parse_field
from .perplexity_rows import csv_row, csv_rows, quantization_tag

__all__ = [
    "COLUMNS", "ORIGINAL_COLUMNS", "SCHEMA_VERSION", "append_results", "append_row", "check_results", "csv_name", "csv_row",
    "csv_rows", "csv_text", "dataset_of", "file_token", "quantization_tag", "read_rows",
]  # fmt: skip

_SUFFIX = "_ppl_results.csv"
_LOCK = ".ppl_results.lock"
_LOCK_TIMEOUT_S = 60.0
_NAME_LIMIT = 80  # a file name may have 255 bytes


def csv_name(dataset: str) -> str:
    """File name of a dataset's results: ``wikitext2_ppl_results.csv``."""
    return file_token(dataset) + _SUFFIX


def file_token(dataset: str) -> str:
    """A dataset's name as a piece of a file name.

    Letters, digits and ``_ . -``. A name that has to be changed for that ends in a digest of it, so that two names never share
    a file.
    """
    token = id_token(dataset).lstrip(".")[:_NAME_LIMIT]
    if token and token == dataset:
        return token
    return f"{token or 'dataset'}-{hashlib.sha256(dataset.encode(errors='surrogateescape')).hexdigest()[:8]}"


def check_results(folder: Path, datasets: Iterable[str] | None = None) -> None:
    """Find out before anything is measured whether rows can be appended to the CSVs in ``folder``.

    Parameters
    ----------
    folder
        May be missing.
    datasets
        Names of the data sets whose files will grow; ``None`` for every perplexity CSV in the folder.

    Raises
    ------
    UserError
        If one of them has another header than `COLUMNS`, or a line that cannot be read.
    """
    paths = sorted(folder.glob("*" + _SUFFIX)) if datasets is None else [folder / csv_name(name) for name in datasets]
    for path in paths:
        if path.exists():
            _appendable(path)


def append_results(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Append ``rows`` to the ``<dataset>_ppl_results.csv`` files in ``folder``, which gather the results of many runs.

    A row whose ``run_id`` and ``case_key`` are in its file already is left out. No file grows before all of them were checked.
    Each is written once and replaced by rename, so no reader sees half a row; writers wait for each other at a lock file.

    Parameters
    ----------
    folder
        Exists.
    rows
        With all of `COLUMNS`; ``None`` becomes an empty field.

    Returns
    -------
    list[Path]
        The files that grew.

    Raises
    ------
    UserError
        If a file has another header, or cannot be read or written.
    ValueError
        If a row has other columns, or a value that `read_rows` would not give back.
    """
    added: dict[Path, list[Mapping[str, Any]]] = {}
    for row in rows:
        _check_row(row)
        added.setdefault(folder / csv_name(str(row["dataset"])), []).append(row)
    return _append(folder, added)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a file, as `append_results` does."""
    _check_row(row)
    _append(path.parent, {path: [row]})


def csv_text(rows: Sequence[Mapping[str, Any]], *, header: bool = True) -> str:
    """``rows`` with all of `COLUMNS` as lines; ``None`` is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({column: format_field(column, row[column]) for column in COLUMNS} for row in rows)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the original program's CSV or ours, columns in any order.

    Returns
    -------
    list[dict[str, Any]]
        Rows with all of `COLUMNS`, numbers as numbers, ``None`` for what a file does not say. A ``dataset`` that the file does
        not say comes from its name.

    Raises
    ------
    UserError
        Naming the file and the line that cannot be read.
    """
    return _parse(_read(path), str(path), dataset_of(path))


def dataset_of(path: Path) -> str:
    """Dataset of a file by its name, as the original's plot has it: what stands before ``_ppl_results``."""
    return path.stem.partition(_SUFFIX.removesuffix(".csv"))[0]


def _append(folder: Path, added: Mapping[Path, Sequence[Mapping[str, Any]]]) -> list[Path]:
    if not added:
        return []
    with _alone_in(folder):
        grown = {path: text for path, rows in added.items() if (text := _grown(path, rows))}
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


def _grown(path: Path, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The file's text with the rows that it lacks, ``None`` if it lacks none."""
    before, present = _appendable(path) if path.exists() else ("", [])
    known = {_identity(row) for row in present}
    new = []
    for row in rows:
        identity = _identity(row)
        if None in identity or identity not in known:
            new.append(row)
        known.add(identity)
    if not new:
        return None
    return before + ("" if before.endswith("\n") or not before else "\n") + csv_text(new, header=not before)


def _identity(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["run_id"], row["case_key"]


def _appendable(path: Path) -> tuple[str, list[dict[str, Any]]]:
    text = _read(path)
    if not text:
        return text, []
    header = _lines(text, str(path))[0][1]
    if header != list(COLUMNS):
        fault = header_fault(header) or "lacks columns, or has them in another order"
        raise UserError(
            f"{path}: its header is not the one that kvsuite writes ({fault}), so no row is added; "
            "move the file away or give another folder"
        )
    return text, _parse(text, str(path), dataset_of(path))


def _check_row(row: Mapping[str, Any]) -> None:
    if set(row) != set(COLUMNS):
        raise ValueError(f"columns differ: {sorted(set(row) ^ set(COLUMNS))}")
    # what is written must come back, or a later reader refuses the whole file
    if not row["dataset"]:
        raise ValueError("dataset is empty")
    try:
        (again,) = _parse(_decoded(csv_text([row]).encode()), "the row", "")
    except UserError as error:
        raise ValueError(f"could not be read again: {error}") from error
    differing = [column for column in COLUMNS if again[column] != row[column]]
    if differing:
        raise ValueError(f"cannot be written to a CSV: {', '.join(f'{name}={row[name]!r}' for name in differing)}")


def _read(path: Path) -> str:
    try:
        return _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); give a perplexity CSV") from error


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def _parse(text: str, where: str, dataset: str) -> list[dict[str, Any]]:
    (_, header), *lines = _lines(text, where)
    if fault := header_fault(header):
        raise UserError(f"{where}: {fault}; mend its header, or give a CSV of kvsuite or of the original program")
    rows = []
    for number, fields in lines:
        if not fields:
            continue
        if len(fields) != len(header):
            s = "s" if len(fields) > 1 else ""
            raise UserError(f"{where}: line {number} has {len(fields)} field{s}, {len(header)} are needed; mend it")
        try:
            row = {name: parse_field(name, field) for name, field in zip(header, fields, strict=True)}
        except ValueError as error:
            raise UserError(f"{where}: line {number} is not a result ({error}); mend or remove it") from error
        rows.append({column: row.get(column) for column in COLUMNS} | {"dataset": row.get("dataset") or dataset})
    return rows


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
