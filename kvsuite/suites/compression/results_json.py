"""The original benchmark's ``results.json``: same keys, same names, rebuilt from records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.meters.quality import NoExponential, exponential
from kvsuite.reporting.aggregate import GIB, Row, by_name, failure, suite_rows, value

from .rows import is_baseline


def results_json(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Build ``results.json`` of the compression suite.

    Keys as in the original: ``config``, ``raw_results`` (one entry per case and text), ``aggregated_stats`` by name,
    ``baseline_stats``. Two things differ on purpose: the aggregated perplexity pools the loss of all texts instead of
    averaging perplexities, and a ``peak_vram_gb`` that was not measured is ``null``, not 0.0. Added beside them:
    ``failed`` (name to status and reason) and ``baseline_name``.

    Parameters
    ----------
    run
        The run line.
    rows
        Record rows; only those of the compression suite are used. Times in s, throughput in tok/s, memory in GiB.

    Raises
    ------
    UserError
        If no row is of the compression suite.
    """
    labelled = by_name(suite_rows(rows, "compression"))
    finished = {name: row for name, row in labelled.items() if row["status"] == "ok"}
    stats = {name: _stats(row) for name, row in finished.items()}
    baseline = next((name for name, row in finished.items() if is_baseline(row)), None)
    return {
        "config": _config(run),
        "raw_results": [result for name, row in finished.items() for result in _raw_results(name, row)],
        "aggregated_stats": stats,
        "baseline_stats": None
        if baseline is None
        else {key: stats[baseline][key] for key in ("perplexity", "accuracy", "throughput", "tpot")},
        "baseline_name": baseline,
        "failed": {
            name: {"status": row["status"], "reason": failure(row)}
            for name, row in labelled.items()
            if row["status"] != "ok"
        },
    }


def _config(run: Mapping[str, Any]) -> dict[str, Any]:
    options = run["options"]
    return {
        "model_id": run["model"],
        "method": run["method"],
        "num_samples": options.get("num_samples"),
        "max_tokens": options.get("max_tokens"),
        "max_new_tokens": options.get("max_new_tokens"),
        "skip_layers": _layers(options.get("skip_layers")),
        "timestamp": run["started_utc"],
    }


def _layers(option: object) -> list[int]:
    if isinstance(option, str):  # as typed: "0,1" or "none"
        return [int(layer) for layer in re.findall(r"\d+", option)]
    return [int(layer) for layer in option] if isinstance(option, Sequence) else []


def _speed(row: Row) -> dict[str, Any]:
    return {name: value(row, name) for name in ("ttft", "tpot", "throughput")}


def _stats(row: Row) -> dict[str, Any]:
    return _speed(row) | {
        "perplexity": value(row, "perplexity"),
        "accuracy": value(row, "accuracy"),
        "peak_vram_gb": _peak_vram_gb(row),
        "cache_size": _cache_tokens(row),
    }


def _raw_results(name: str, row: Row) -> list[dict[str, Any]]:
    # a case that scored no text (random weights) still measured speed and memory
    texts = row["samples"].get("texts") or [{"nll_sum": None, "tokens": 0, "correct": None}]
    case = row["case"]
    return [
        _speed(row)
        | {
            "total_time": value(row, "e2e_s"),
            "perplexity": _perplexity(text),
            "accuracy": text["correct"] / text["tokens"] if text["tokens"] else None,
            "eval_tokens": text["tokens"],
            "final_cache_size": _cache_tokens(row),
            "peak_vram_gb": _peak_vram_gb(row),
            "method": name,
            "config": {"policy": case["policy"], **case["policy_params"]},
        }
        for text in texts
    ]


def _peak_vram_gb(row: Row) -> float | None:
    peak = value(row, "peak_vram")
    return None if peak is None else peak / GIB


def _cache_tokens(row: Row) -> float | None:
    # the mean over layers is whole unless some layers are skipped
    tokens = value(row, "cache_tokens_mean")
    return int(tokens) if tokens is not None and tokens.is_integer() else tokens


def _perplexity(text: Mapping[str, Any]) -> float | None:
    """Of one text: all texts together may have one where a single one has none."""
    try:
        return exponential(text["nll_sum"] / text["tokens"]) if text["tokens"] else None
    except NoExponential:
        return None
