"""Rows of text out of files: plain text, JSON, Parquet, Arrow, and folders made by datasets."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from kvsuite.errors import UserError

SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")
_PLAIN = (".txt", ".raw")
_BINARY = (".parquet", ".arrow")


def is_plain(path: Path) -> bool:
    """Whether a file is one text, and not rows of them."""
    return not path.is_dir() and _suffix(path) in _PLAIN


def text_rows(path: Path, *, typed: str, split: str) -> Iterator[str]:
    """Read the texts of a local file or ``Dataset.save_to_disk`` folder, one by one.

    Parameters
    ----------
    path
        The file or folder; its suffix, one of `SUFFIXES`, decides how it is read. A text file is one text; otherwise
        each row is one, from the column ``text`` or the only column of strings.
    typed
        Option and value, for messages: ``"--kv-corpus=x.json"``.
    split
        Split to take from a folder that has several.

    Raises
    ------
    UserError
        If the file is of an unknown kind, cannot be read, does not say which column holds the text, or has a row without one.
    """
    readers: dict[str, Callable[[], Iterable[str]]] = {
        **dict.fromkeys(_PLAIN, lambda: [_read(path)]),
        **dict.fromkeys((".jsonl", ".json", ".jsonl.gz", ".json.gz"), lambda: _json_rows(typed, path)),
        ".parquet": lambda: _parquet_rows(typed, path),
        ".arrow": lambda: _arrow_rows(typed, path),
    }
    reader = (lambda: _disk_rows(typed, path, split)) if path.is_dir() else readers.get(_suffix(path))
    if reader is None:
        raise UserError(f"{typed}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    try:
        yield from reader()
    except UserError:
        raise
    except UnicodeDecodeError as error:
        # the strings of the binary formats are UTF-8 by definition
        mend = "give an intact file" if path.is_dir() or _suffix(path) in _BINARY else "save it as UTF-8"
        raise UserError(f"{typed}: is not UTF-8 ({error.reason} at byte {error.start}); {mend}") from error
    # errors of decoding, of JSON and most of Arrow are ValueErrors, of a kind that Arrow cannot read RuntimeErrors
    except (ValueError, OSError, EOFError, zlib.error, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise UserError(f"{typed}: cannot be read ({reason}); give an intact file") from error


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _json_rows(typed: str, path: Path) -> Iterator[str]:
    with _open_lines(path) as lines:
        yield from _json_texts(typed, path, _json_objects(typed, lines))


def _open_lines(path: Path) -> TextIO:
    # only \n ends a line: JSON may hold the other characters that Python takes for line ends
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _json_objects(typed: str, lines: TextIO) -> Iterator[dict[str, Any]]:
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    number, first = next(filled, (1, ""))
    if first.lstrip().startswith("["):
        rows: Iterable[Any] = _parsed(typed, number, first + lines.read())
    else:
        rows = (_parsed(typed, *numbered) for numbered in chain([(number, first)] if first else [], filled))
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{typed}: rows must be JSON objects with a column text; give such a file")
        yield row


def _parsed(typed: str, number: int, text: str) -> Any:
    """The JSON of ``text``, which begins at line ``number`` of its file."""
    try:
        # an error at the end of a line is not at the beginning of the next one
        return json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{typed}: line {number + error.lineno - 1} cannot be read as JSON ({error.msg}, column {error.colno}); mend or "
            "remove it, or give another file"
        ) from error


def _json_texts(typed: str, path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    seen = []
    for row in rows:
        seen.append(row)
        # the first text decides, so that the first rows of a large file do not cost the memory and time of all
        if isinstance(row.get("text"), str):
            column = "text"
            break
    else:
        if not seen:
            return
        columns = {name: value for row in reversed(seen) for name, value in row.items() if value is not None}
        column = _text_column(typed, list(columns), [name for name, value in columns.items() if isinstance(value, str)])
    for value in _filled(typed, path, column, (row.get(column) for row in chain(seen, rows))):
        if not isinstance(value, str):
            raise UserError(
                f"{typed}: a row has {str(value)[:50]!r} in the column {column}; give a file with texts there"
            )
        yield value


def _filled(typed: str, path: Path, column: str, values: Iterable[Any]) -> Iterator[Any]:
    """The values of the text column, each of which has to be there: a missing one is a defect, not an empty text."""
    for number, value in enumerate(values, 1):
        if value is None:
            raise UserError(
                f"{typed}: row {number} of {path} has no text in the column {column}; remove the row, or give another column "
                "the name text"
            )
        yield value


def _parquet_rows(typed: str, path: Path) -> Iterator[str]:
    from pyarrow import parquet

    # in batches, so that the first texts of a large file do not cost the memory of all
    with parquet.ParquetFile(path) as file:
        column = _schema_column(typed, file.schema_arrow)
        batches = file.iter_batches(batch_size=64, columns=[column])
        yield from _filled(typed, path, column, (text for batch in batches for text in batch.column(0).to_pylist()))


def _arrow_rows(typed: str, path: Path) -> Iterator[str]:
    import pyarrow as pa

    # datasets writes the stream format, most others the file format
    with pa.memory_map(str(path)) as stream:
        try:
            table = pa.ipc.open_stream(stream).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(stream).read_all()
        column = _schema_column(typed, table.schema)
        values = _arrow_values(table.column(column))
    yield from _filled(typed, path, column, values)


def _disk_rows(typed: str, path: Path, split: str) -> Iterator[str]:
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(f"{typed}: no folder made by Dataset.save_to_disk; give one, or a file")
    try:
        dataset = load_from_disk(str(path))
    except (LookupError, TypeError, AttributeError) as error:
        # its own files of facts are JSON that it does not check
        raise ValueError(f"damaged folder: {error!r}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(
                f"{typed}: no split {split!r}; the folder has {', '.join(dataset) or 'none'}; take one of those "
                "(--kv-split), or give the folder of one split"
            )
        dataset = dataset[split]
    column = _schema_column(typed, dataset.features.arrow_schema)
    # in batches as for Parquet; with a format of its own, because a saved one may hide columns
    batches = dataset.with_format("arrow").select_columns([column]).iter(64)
    yield from _filled(typed, path, column, (text for batch in batches for text in _arrow_values(batch.column(0))))


def _arrow_values(column: Any) -> list[str | None]:
    # Arrow trusts the offsets in a file; those of a damaged one lead outside the memory map
    column.validate(full=True)
    values: list[str | None] = column.to_pylist()
    return values


def _schema_column(typed: str, schema: Any) -> str:
    import pyarrow as pa

    strings = [item.name for item in schema if pa.types.is_string(item.type) or pa.types.is_large_string(item.type)]
    return _text_column(typed, list(schema.names), strings)


def _text_column(typed: str, columns: Sequence[str], strings: Sequence[str]) -> str:
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    found = f"the columns are {', '.join(sorted(columns)) or 'none'}"
    if not strings:
        raise UserError(
            f"{typed}: no column text, nor any other column of strings; {found}; give a file that has texts"
        )
    raise UserError(
        f"{typed}: no column text, and not exactly one column of strings; {found}; rename one of them to text"
    )
