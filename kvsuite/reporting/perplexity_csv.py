"""``<dataset>_ppl_results.csv``: the original's columns first, then what they left out. Reads both kinds of file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.record import metric_value

from .aggregate import Row
from .files import write_atomic

ORIGINAL_COLUMNS = (
    "mlc_model",
    "hf_model",
    "device",
    "max_length",
    "stride",
    "split",
    "load_in_4bit",
    "load_in_8bit",
    "fake_q3bit",
    "ppl",
)
COLUMNS = (
    *ORIGINAL_COLUMNS,
    "dataset",
    "text_sha256",
    "num_tokens",
    "num_targets",
    "dtype",
    "seconds",
    "nll_mean",
    "protocol",
    "perplexity_se",
    "ppl_original_formula",
    "bos",
    "quantization",
    "run_id",
    "schema_version",
)
SCHEMA_VERSION = 1
_SUFFIX = "_ppl_results.csv"
_INTEGERS = {
    "max_length",
    "stride",
    "load_in_4bit",
    "load_in_8bit",
    "fake_q3bit",
    "num_tokens",
    "num_targets",
    "schema_version",
}
_FLOATS = {"ppl", "seconds", "nll_mean", "perplexity_se", "ppl_original_formula"}
_FLAGS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit", "fake_q3": "fake_q3bit"}


def csv_name(dataset: str) -> str:
    """File name of a dataset's results: ``wikitext2_ppl_results.csv``."""
    return dataset + _SUFFIX


def quantization_tag(row: Mapping[str, Any]) -> str:
    """What a row's bar is called.

    The row's own ``quantization`` where it has one; else from the original's flags, ``fake_q3`` before ``4bit`` before
    ``8bit``, and without a flag the row's dtype, for the original's rows ``fp16``.
    """
    if row.get("quantization"):
        return str(row["quantization"])
    for tag in ("fake_q3", "4bit", "8bit"):
        if row[_FLAGS[tag]]:
            return tag
    return str(row.get("dtype") or "fp16")


def csv_row(record: Row, *, run_id: str) -> dict[str, Any]:
    """Build a row of `COLUMNS` from the record of a finished perplexity case.

    Parameters
    ----------
    record
        A record row of status ``ok``. Read are, of ``case``: model, device, dtype, quantization, ``params.mlc_model``,
        ``workload`` (max_length, stride, split, protocol, bos); of ``dataset``: name, text_hash; of ``tokens``: ``text``; of
        ``effective``: device and dtype; the metrics perplexity, perplexity_se, nll_sum, nll_tokens, ``score_s`` and
        ``ppl_original_formula``.
    run_id
        Of the run.

    Raises
    ------
    ValueError
        If the record has no perplexity: a failed case has no row.
    """
    ppl = metric_value(dict(record), "perplexity") if record["status"] == "ok" else None
    if ppl is None:
        raise ValueError(f"{record['id']}: no perplexity, so no row")
    case, effective, dataset = record["case"], record["effective"], record["dataset"]
    workload, quantization = case["workload"], case["quantization"]
    nll_sum, targets = (metric_value(dict(record), name) for name in ("nll_sum", "nll_tokens"))
    assert nll_sum is not None
    assert targets is not None
    flags = {column: int(quantization == tag) for tag, column in _FLAGS.items()}
    row = {
        "mlc_model": case["params"].get("mlc_model"),
        "hf_model": case["model"],
        "device": effective.get("device", case["device"]),
        "max_length": workload["max_length"],
        "stride": workload["stride"],
        "split": workload["split"],
        **{column: flags[column] for column in ORIGINAL_COLUMNS if column in flags},
        "ppl": ppl,
        "dataset": dataset["name"],
        "text_sha256": str(dataset["text_hash"]).removeprefix("sha256:"),
        "num_tokens": record["tokens"].get("text"),
        "num_targets": int(targets),
        "dtype": effective.get("dtype", case["dtype"]),
        "seconds": metric_value(dict(record), "score_s"),
        "nll_mean": nll_sum / targets,
        "protocol": workload["protocol"],
        "perplexity_se": metric_value(dict(record), "perplexity_se"),
        "ppl_original_formula": metric_value(dict(record), "ppl_original_formula"),
        "bos": workload["bos"],
        "quantization": quantization,
        "run_id": run_id,
        "schema_version": SCHEMA_VERSION,
    }
    return {column: row[column] for column in COLUMNS}


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row; a new file gets the header. The whole file is replaced by rename, so no reader sees half a row.

    Parameters
    ----------
    path
        The CSV, new or written by this version; its folder exists. One process writes it at a time.
    row
        All of `COLUMNS`; ``None`` becomes an empty field.

    Raises
    ------
    UserError
        If the file has another header, or cannot be read or written.
    ValueError
        If the row has other columns.
    """
    if set(row) != set(COLUMNS):
        raise ValueError(f"columns differ: {sorted(set(row) ^ set(COLUMNS))}")
    before = _read(path) if path.exists() else ""
    if before and _header(before) != list(COLUMNS):
        raise UserError(
            f"{path}: its header is not the one that kvsuite writes, so no row is added; "
            "move the file away or give another folder"
        )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerow({column: _text(row[column]) for column in COLUMNS})
    write_atomic(path, before + ("" if before.endswith("\n") or not before else "\n") + buffer.getvalue())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the original program's CSV or ours.

    Returns
    -------
    list[dict[str, Any]]
        Rows with all of `COLUMNS`, numbers as numbers, ``None`` for what a file does not say. An original's ``dataset`` comes
        from the file's name.

    Raises
    ------
    UserError
        Naming the file and the line that cannot be read.
    """
    text = _read(path)
    header = _header(text)
    if header not in (list(ORIGINAL_COLUMNS), list(COLUMNS)):
        raise UserError(f"{path}: not a perplexity CSV; its first columns must be {', '.join(ORIGINAL_COLUMNS)}")
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""))
    next(reader)
    for fields in reader:
        if not fields:
            continue
        if len(fields) != len(header):
            raise UserError(
                f"{path}: line {reader.line_num} has {len(fields)} fields, {len(header)} are needed; mend it"
            )
        try:
            row = {name: _value(name, field) for name, field in zip(header, fields, strict=True)}
        except ValueError as error:
            raise UserError(f"{path}: line {reader.line_num} is not a result ({error}); mend or remove it") from error
        rows.append(dict.fromkeys(COLUMNS) | {"dataset": dataset_of(path)} | row)
    return rows


def dataset_of(path: Path) -> str:
    """Dataset of a file by its name, as the original's plot has it: what stands before ``_ppl_results``."""
    return path.stem.partition(_SUFFIX.removesuffix(".csv"))[0]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); give a perplexity CSV") from error


def _header(text: str) -> list[str]:
    return next(csv.reader(io.StringIO(text, newline="")), [])


def _value(name: str, field: str) -> Any:
    if name in _INTEGERS:
        return int(field) if field else None
    if name in _FLOATS and (field or name == "ppl"):
        number = float(field)
        if not math.isfinite(number):
            raise ValueError(f"{name} is {field}")
        return number
    return field or None


def _text(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
