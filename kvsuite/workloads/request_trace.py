"""A trace of requests in CSV, as Azure published one: how long each one's prompt and answer were, and when it came.

Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024; the files are in the repository
Azure/AzurePublicDataset.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.errors import UserError
from kvsuite.options.paths import expanded

CONTEXT, GENERATED = "ContextTokens", "GeneratedTokens"
_STAMPS = ("timestamp", "arrival_timestamp", "arrived_at")
_OPTION = "--kv-trace-conv"
#: rows of the original's filter: prompts of at least so many tokens, and answers of so many
LEAST_CONTEXT, LEAST_GENERATED, MOST_GENERATED = 1024, 256, 512


@dataclass(frozen=True, order=True)
class TraceRow:
    """One request of a trace.

    Parameters
    ----------
    context
        Tokens of the prompt.
    generated
        Tokens of the answer.
    time_s
        When it came, in seconds from any origin; ``None`` in a trace that does not say.
    """

    context: int
    generated: int
    time_s: float | None = None


def heavy_rows(path: str, count: int) -> list[TraceRow]:
    """The ``count`` rows with the longest contexts among those with a long prompt and a long answer, as the original chose.

    Rows have at least 1024 tokens of context and 256 to 512 generated ones; of rows of equal context the earlier in the file
    comes first.

    Parameters
    ----------
    path
        CSV file, gzip too, with columns ``ContextTokens`` and ``GeneratedTokens``, and ``TIMESTAMP`` if arrivals are wanted.
    count
        Rows wanted.

    Returns
    -------
    list[TraceRow]
        By context, longest first.

    Raises
    ------
    UserError
        If the file cannot be read, has other columns, or has fewer such rows.
    """
    rows = enumerate(
        row
        for row in _rows(path)
        if row.context >= LEAST_CONTEXT and LEAST_GENERATED <= row.generated <= MOST_GENERATED
    )
    # the place in the file decides between equal contexts, and a file of millions of rows is not held
    found = [row for _, row in heapq.nsmallest(count, rows, key=lambda item: (-item[1].context, item[0]))]
    if len(found) < count:
        raise UserError(
            f"{_OPTION}={path}: {len(found)} rows have a context of at least {LEAST_CONTEXT} tokens and {LEAST_GENERATED} to "
            f"{MOST_GENERATED} generated ones, {count} are needed; give a longer trace, or ask for smaller batches"
        )
    return found


def first_rows(path: str, count: int) -> list[TraceRow]:
    """The first ``count`` rows by time, whatever their lengths: arrivals for prompts that are not the trace's.

    Raises
    ------
    UserError
        As `heavy_rows`, or if the trace has no times.
    """
    rows = _rows(path)
    found = heapq.nsmallest(count, rows, key=lambda row: times_of([row], path)[0])
    if len(found) < count:
        raise UserError(
            f"{_OPTION}={path}: has {len(found)} rows, {count} are needed; give a longer trace, or ask for smaller batches"
        )
    return found


def times_of(rows: Sequence[TraceRow], path: str) -> list[float]:
    """When the rows came, in seconds from any origin.

    Raises
    ------
    UserError
        If the trace does not say.
    """
    times = [row.time_s for row in rows if row.time_s is not None]
    if len(times) < len(rows):
        raise UserError(
            f"{_OPTION}={path}: rows without a time in a column TIMESTAMP, so there are no arrivals; give a trace that has "
            "them, or --kv-arrivals=poisson with --kv-arrival-rate"
        )
    return times


def _rows(path: str) -> Iterator[TraceRow]:
    import pyarrow as pa
    from pyarrow import csv

    file = expanded(path)
    if not file.is_file():
        raise UserError(
            f"{_OPTION}={path}: no such file; give AzureLLMInferenceTrace_conv.csv of the repository Azure/AzurePublicDataset, "
            f"or any CSV with columns {CONTEXT} and {GENERATED}"
        )
    try:
        with csv.open_csv(file) as header:
            names = header.schema.names
        columns = _columns(path, names)
        types = {CONTEXT: pa.int64(), GENERATED: pa.int64()}
        convert = csv.ConvertOptions(include_columns=columns, column_types=types)
        with csv.open_csv(file, convert_options=convert) as reader:
            for batch in reader:
                yield from _of_batch(path, batch, columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"{_OPTION}={path}: cannot be read as a CSV of whole numbers ({reason}); give an intact trace"
        ) from error


def _columns(path: str, names: Sequence[str]) -> list[str]:
    missing = [name for name in (CONTEXT, GENERATED) if name not in names]
    if missing:
        raise UserError(
            f"{_OPTION}={path}: no column {' nor '.join(missing)}; its columns are {', '.join(names) or 'none'}; give a trace "
            f"with {CONTEXT} and {GENERATED}"
        )
    return [CONTEXT, GENERATED, *[name for name in names if name.casefold() in _STAMPS][:1]]


def _of_batch(path: str, batch: Any, columns: Sequence[str]) -> Iterator[TraceRow]:
    contexts, answers = batch.column(CONTEXT).to_pylist(), batch.column(GENERATED).to_pylist()
    times = _seconds(path, batch.column(columns[2])) if len(columns) > 2 else [None] * len(contexts)
    for context, generated, time_s in zip(contexts, answers, times, strict=True):
        if context is not None and generated is not None:
            yield TraceRow(context, generated, time_s)


def _seconds(path: str, column: Any) -> list[float | None]:
    """Times in seconds; a column of dates is cut to nanoseconds, one of numbers is seconds already."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        unit = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
        counts: list[int | None] = column.cast(pa.int64()).to_pylist()
        return [None if count is None else count / unit for count in counts]
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        numbers: list[float | None] = column.cast(pa.float64()).to_pylist()
        return numbers
    if pa.types.is_null(column.type):
        return [None] * len(column)
    raise UserError(
        f"{_OPTION}={path}: its times are no dates and no seconds ({str(column[0].as_py())[:40]!r}); give them as "
        "2023-11-16 18:15:46.68, or as seconds"
    )
