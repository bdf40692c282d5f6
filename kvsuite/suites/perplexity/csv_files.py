"""``<dataset>_ppl_results.csv``: the original's columns first, then what they left out. Reads both kinds of file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvsuite.case import id_token
from kvsuite.errors import UserError
from kvsuite.reporting.gathered_csv import CsvRow, GatheredCsv, lines_of, read_text, records_of

from .columns import COLUMNS, ORIGINAL_COLUMNS, SCHEMA_VERSION, format_field, header_fault, parse_field
from .rows import csv_row, csv_rows, quantization_tag

__all__ = [
    "COLUMNS", "ORIGINAL_COLUMNS", "SCHEMA_VERSION", "append_results", "append_row", "check_results", "csv_name", "csv_row",
    "csv_rows", "csv_text", "dataset_of", "file_token", "quantization_tag", "read_rows",
]  # fmt: skip

_SUFFIX = "_ppl_results.csv"
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
        _FILE.check_appendable(path)


def append_results(folder: Path, rows: Sequence[CsvRow]) -> list[Path]:
    """Append ``rows`` to the ``<dataset>_ppl_results.csv`` files in ``folder``, as `GatheredCsv.append` does.

    A row whose ``run_id`` and ``case_key`` are in its file already is left out.

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
    added: dict[Path, list[CsvRow]] = {}
    for row in rows:
        _check_row(row)
        added.setdefault(folder / csv_name(str(row["dataset"])), []).append(row)
    return _FILE.append(folder, added)


def append_row(path: Path, row: CsvRow) -> None:
    """Append one row to a file, as `append_results` does."""
    _check_row(row)
    _FILE.append(path.parent, {path: [row]})


def csv_text(rows: Sequence[CsvRow], *, header: bool = True) -> str:
    """``rows`` with all of `COLUMNS` as lines; ``None`` is an empty field."""
    return _FILE.text(rows, header=header)


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
    return _parse(read_text(path, "perplexity"), str(path), dataset_of(path))


def dataset_of(path: Path) -> str:
    """Dataset of a file by its name, as the original's plot has it: what stands before ``_ppl_results``."""
    return path.stem.partition(_SUFFIX.removesuffix(".csv"))[0]


def is_results_name(name: str) -> bool:
    """Whether a file of that name is kvsuite's or the original's: ``<dataset>_ppl_results.csv``."""
    return name.endswith(_SUFFIX)


def _check_row(row: CsvRow) -> None:
    if "dataset" in row and not row["dataset"]:
        raise ValueError("dataset is empty")
    _FILE.check_row(row)


def _parse(text: str, where: str, dataset: str) -> list[dict[str, Any]]:
    lines = lines_of(text, where)
    header = lines[0][1]
    if fault := header_fault(header):
        raise UserError(f"{where}: {fault}; mend its header, or give a CSV of kvsuite or of the original program")
    rows = []
    for number, fields in records_of(lines, where):
        try:
            row = {name: parse_field(name, field) for name, field in zip(header, fields, strict=True)}
        except ValueError as error:
            raise UserError(f"{where}: line {number} is not a result ({error}); mend or remove it") from error
        rows.append({column: row.get(column) for column in COLUMNS} | {"dataset": row.get("dataset") or dataset})
    return rows


def _rows(text: str, where: str) -> list[dict[str, Any]]:
    return _parse(text, where, "")


def _identity(row: CsvRow) -> tuple[Any, ...] | None:
    identity = row["run_id"], row["case_key"]
    return None if None in identity else identity


_FILE = GatheredCsv("perplexity", COLUMNS, ".ppl_results.lock", header_fault, format_field, _rows, _identity)
