"""Rows of a perplexity CSV out of the records of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.record import metric_value
from kvsuite.reporting.aggregate import Row

from .columns import COLUMNS, FLAGS, ORIGINAL_COLUMNS, SCHEMA_VERSION


def quantization_tag(row: Mapping[str, Any]) -> str:
    """What a row's bar is called.

    The row's own ``quantization`` where it has one; else from the original's flags, ``fake_q3`` before ``4bit`` before
    ``8bit``, and without a flag the row's dtype, for the original's rows ``fp16``.
    """
    if row.get("quantization"):
        return str(row["quantization"])
    for tag in ("fake_q3", "4bit", "8bit"):
        if row[FLAGS[tag]]:
            return tag
    return str(row.get("dtype") or "fp16")


def csv_row(record: Row, run: Mapping[str, Any]) -> dict[str, Any]:
    """Build a row of `COLUMNS` from the record of a finished perplexity case.

    Parameters
    ----------
    record
        A record row of status ``ok``. Read are: ``case_key`` and ``started_utc``; of ``case``: model, device, dtype,
        quantization, ``params.mlc_model``, ``workload`` (max_length, stride, protocol); of ``dataset``: name, text_hash, bos,
        split, revision; of ``model``: revision, tokenizer_hash; of ``tokens``: ``text``; of ``effective``: device, dtype and
        weight_format; the metrics perplexity, perplexity_se, nll_sum, nll_tokens, ``score_s`` and ``ppl_original_formula``.
    run
        The run line: ``run_id``, ``kvsuite_version`` and of ``environment`` the host's name and the versions of torch and
        transformers; what it does not say is ``None``.

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
    flags = {column: int(quantization == tag) for tag, column in FLAGS.items()}
    row = {
        "mlc_model": case["params"].get("mlc_model"),
        "hf_model": case["model"],
        "device": effective.get("device", case["device"]),
        "max_length": workload["max_length"],
        "stride": workload["stride"],
        # of the text that was read: most have none, whatever was asked for
        "split": dataset.get("split"),
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
        # resolved; the case may say "auto"
        "bos": dataset["bos"],
        "quantization": effective.get("weight_format", quantization),
        "run_id": str(run["run_id"]),
        "schema_version": SCHEMA_VERSION,
        "started_utc": record.get("started_utc") or run.get("started_utc"),
        "host": _fact(run, "environment", "host", "name"),
        "kvsuite_version": run.get("kvsuite_version"),
        "torch_version": _fact(run, "environment", "packages", "torch"),
        "transformers_version": _fact(run, "environment", "packages", "transformers"),
        "model_revision": _fact(record, "model", "revision"),
        "tokenizer_hash": _fact(record, "model", "tokenizer_hash"),
        "dataset_revision": dataset.get("revision"),
        "case_key": record.get("case_key") or None,
    }
    return {column: row[column] for column in COLUMNS}


def csv_rows(run: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for every perplexity case of a run that has a perplexity."""
    return [
        csv_row(row, run)
        for row in rows
        if row["suite"] == "perplexity" and row["status"] == "ok" and metric_value(dict(row), "perplexity") is not None
    ]


def _fact(document: Mapping[str, Any], *path: str) -> str | None:
    found: Any = document
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else str(found)
