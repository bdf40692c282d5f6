from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteRows = Callable[..., Path]


def _write_rows(folder: Path, kind: str, rows: Sequence[Any], column: str = "text", split: str = "test") -> Path:
    """Write rows as one kind of file or folder, beside a column of numbers; ``column`` empty: rows are the columns."""
    import pyarrow as pa
    from datasets import Dataset, DatasetDict
    from pyarrow import parquet

    columns = {"id": list(range(len(rows))), column: list(rows)}
    table = pa.table(columns) if column else pa.Table.from_pylist(list(rows))
    path = folder / f"corpus.{kind}"
    if kind.startswith("json"):
        lines = [json.dumps(row) for row in table.to_pylist()]
        text = "[" + ",\n".join(lines) + "]" if kind.startswith("json.") or kind == "json" else "\n".join([*lines, ""])
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
    elif kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "disk":
        Dataset(table).save_to_disk(path)
    elif kind == "dict":
        DatasetDict({split: Dataset(table)}).save_to_disk(path)
    return path


@pytest.fixture
def write_rows() -> WriteRows:
    return _write_rows
