"""Rows of text out of files: plain text, JSON, Parquet, Arrow, and folders made by datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError

SUFFIXES = (".txt", ".raw", ".jsonl", ".json", ".parquet", ".arrow")


def text_rows(path: Path, *, option: str, split: str) -> Iterator[str]:
    """Read the texts of a local file or ``Dataset.save_to_disk`` folder, one by one.

    Parameters
    ----------
    path
        The file or folder; its suffix, one of `SUFFIXES`, decides how it is read. A text file is one text; otherwise
        each row is one, from the column ``text`` or the only column of strings. A missing value reads as an empty text.
    option
        Option and value as typed, for messages: ``"--kv-corpus=x.json"``.
    split
        Split to take from a folder that has several.

    Raises
    ------
    UserError
        If the file is of an unknown kind, cannot be read, or does not say which column holds the text.
    """
    readers: dict[str, Callable[[], Iterable[str]]] = {
        ".txt": lambda: [_read(path)],
        ".raw": lambda: [_read(path)],
        ".jsonl": lambda: _json_rows(option, path),
        ".json": lambda: _json_rows(option, path),
        ".parquet": lambda: _parquet_rows(option, path),
        ".arrow": lambda: _arrow_rows(option, path),
    }
    reader = (lambda: _disk_rows(option, path, split)) if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{option}: unknown kind of file; give one of {', '.join(SUFFIXES)}")
    try:
        yield from reader()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        # errors of decoding, of JSON and of arrow are ValueErrors
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise UserError(f"{option}: cannot be read ({reason}); give an intact file") from error


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _json_rows(option: str, path: Path) -> Iterable[str]:
    text = _read(path)
    is_list = text.lstrip().startswith("[")
    rows: Any = json.loads(text) if is_list else [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{option}: rows must be JSON objects with a column text; give such a file")
    columns = {name: value for row in reversed(rows) for name, value in row.items() if value is not None}
    column = _text_column(option, list(columns), [name for name, value in columns.items() if isinstance(value, str)])
    return [row.get(column) or "" for row in rows]


def _parquet_rows(option: str, path: Path) -> Iterator[str]:
    from pyarrow import parquet

    # in batches, so that the first texts of a large file do not cost the memory of all
    with parquet.ParquetFile(path) as file:
        column = _schema_column(option, file.schema_arrow)
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            yield from (value or "" for value in batch.column(0).to_pylist())


def _arrow_rows(option: str, path: Path) -> Iterable[str]:
    import pyarrow as pa

    # datasets writes the stream format, most others the file format
    with pa.memory_map(str(path)) as stream:
        try:
            table = pa.ipc.open_stream(stream).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(stream).read_all()
        values = table.column(_schema_column(option, table.schema)).to_pylist()
    return [value or "" for value in values]


def _disk_rows(option: str, path: Path, split: str) -> Iterable[str]:
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(f"{option}: no folder made by Dataset.save_to_disk; give one, or a file")
    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(f"{option}: no split {split!r}; the folder has {', '.join(dataset)}")
        dataset = dataset[split]
    column = _schema_column(option, dataset.features.arrow_schema)
    return [value or "" for value in dataset[column]]


def _schema_column(option: str, schema: Any) -> str:
    import pyarrow as pa

    strings = [item.name for item in schema if pa.types.is_string(item.type) or pa.types.is_large_string(item.type)]
    return _text_column(option, list(schema.names), strings)


def _text_column(option: str, columns: Sequence[str], strings: Sequence[str]) -> str:
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"{option}: no column text, and not exactly one column of strings; "
        f"the columns are {', '.join(sorted(columns)) or 'none'}; rename one of them to text"
    )
