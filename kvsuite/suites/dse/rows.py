"""Rows of the two design-space CSVs out of the records of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.record import metric_value
from kvsuite.reporting.aggregate import MIB, Row, failure

from .columns import AXES, METRICS, RESULTS, SCHEMA_VERSION

DSE = "dse"
OFF = -1
#: the short names of the axes in a case's ``params``; the original's names are understood too
PARAMS = dict(zip(AXES, ("context", "prefill_chunk", "batch", "window", "sink"), strict=True))
#: the engine's own rate was that of its decode steps, without the prompts that are fed between them
_DECODE_RATES = ("decode_tok_s_batch", "decode_tok_s_agg")
#: the original's metric names for what a record has under another name: (metric, or field of the record's ``tokens``)
_ORIGINAL_NAMES = {
    "prompt_tokens_sum": "prompt",
    "completion_tokens_sum": "generated",
    "prefill_tokens_sum": "prefill_computed",
    "prefill_tokens_per_s": "prefill_tok_s_computed",
    "last_finished_request_end_to_end_latency_s": "e2e_s",
    "last_finished_request_ttft_s": "ttft_s",
}


def csv_rows(run: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of the results CSV for every design-space case of a run: one a round, one with ``run_id`` 0 for a case without.

    Parameters
    ----------
    run
        The run line: ``run_id``, ``kvsuite_version`` and of ``environment`` host, gpu, packages, commit; what it does not
        say is ``None``.
    rows
        Record rows. Read are ``case`` (engine, model, quantization, dtype, device, ``params`` with context, prefill_chunk,
        batch, window, sink, ``workload.max_new_tokens``), ``effective`` (device, dtype), ``inert``, ``memory`` (predicted and
        reported: total_bytes, params_bytes, kvcache_bytes, temp_bytes, or nano's weights_bytes, pool_bytes, workspace_bytes;
        measured: kv_bytes_allocated), ``tokens``, ``samples.approx_chars`` (a number for every round) and the metrics ttft_s,
        ttft_cached_s, tpot_s, e2e_s, prefill_tok_s_computed, decode_step_s, decode_tok_s_batch, decode_tok_s_agg,
        tpot_floor_s, perplexity, perplexity_se, kv_bytes_exact, mem_weights_bytes, mem_measured_peak_bytes.

    Returns
    -------
    list[dict[str, Any]]
        With all of ``RESULTS.columns``; memory in MB of 2^20 bytes.
    """
    return [row for record in rows if record["suite"] == DSE for row in _results(run, record)]


def metric_rows(run: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of the metrics CSV for every finished design-space case of a run: one a metric.

    First what the engine itself printed (``samples.engine_metrics``, by its own names), or without that what the record has of
    the original's names; then every metric of the record under its own name.

    Returns
    -------
    list[dict[str, Any]]
        With all of ``METRICS.columns``.
    """
    return [
        dict.fromkeys(METRICS.columns) | _shared(run, record) | found
        for record in rows
        if record["suite"] == DSE and record["status"] == "ok"
        for found in _metrics(record)
    ]


def _results(run: Mapping[str, Any], record: Row) -> list[dict[str, Any]]:
    shared = dict.fromkeys(RESULTS.columns) | _shared(run, record) | _memory(record)
    if record["status"] != "ok":
        return [_only(RESULTS.columns, shared | {"run_id": 0, "reason": failure(record)})]
    tokens = record["tokens"]
    shared |= {
        "perplexity": _value(record, "perplexity"),
        "perplexity_se": _value(record, "perplexity_se"),
        "tpot_floor_s": _value(record, "tpot_floor_s"),
        "prompt_tokens": tokens.get("prompt"),
        "prefill_tokens_computed": tokens.get("prefill_computed"),
        "completion_tokens": tokens.get("generated"),
    }
    return [
        _only(RESULTS.columns, shared | _round(record, number)) for number in range(max(int(record["rounds"] or 0), 1))
    ]


def _round(record: Row, number: int) -> dict[str, Any]:
    tpot = _sample(record, "tpot_s", number)
    # of several requests a step is the time in which all decode; a token of one of them waits for prompts as well
    step = _sample(record, "decode_step_s", number) or tpot
    floor = _value(record, "tpot_floor_s")
    chars = record["samples"].get("approx_chars") or ()
    return {
        "run_id": number + 1,
        "time_s": _sample(record, "e2e_s", number) or None,
        "approx_chars": chars[number] if number < len(chars) else None,
        "ttft_s": _sample(record, "ttft_s", number),
        "ttft_cached_s": _sample(record, "ttft_cached_s", number),
        "tpot_s": tpot,
        "prefill_tok_s": _sample(record, "prefill_tok_s_computed", number),
        "decode_tok_s": _sample(record, _decode_rate(record), number),
        # 1: as fast as the memory allows
        "floor_share": floor / step if floor is not None and step else None,
    }


def _decode_rate(record: Row) -> str:
    """The first of the decode rates that the record has."""
    return next((name for name in _DECODE_RATES if _value(record, name) is not None), _DECODE_RATES[-1])


def _metrics(record: Row) -> list[dict[str, Any]]:
    engine: Mapping[str, float] = record["samples"].get("engine_metrics") or {}
    if engine:
        rows: list[dict[str, Any]] = [{"metric_name": name, "metric_value": value} for name, value in engine.items()]
    else:
        names = _ORIGINAL_NAMES | {"decode_tokens_per_s": _decode_rate(record)}
        rows = [found for name, ours in names.items() if (found := _metric(record, name, ours))]
    known = {row["metric_name"] for row in rows}
    return rows + [
        found for name in record["metrics"] if name not in known and (found := _metric(record, name, name)) is not None
    ]


def _metric(record: Row, name: str, ours: str) -> dict[str, Any] | None:
    """A row of the metrics CSV out of a metric or a count of tokens; ``None`` where the record has no value."""
    if ours in record["tokens"]:
        return {"metric_name": name, "metric_value": record["tokens"][ours], "unit": "tokens"}
    entry = record["metrics"].get(ours) or {}
    if entry.get("value") is None:
        return None
    found = {"unit": entry.get("unit"), "samples": entry.get("n"), "smallest": entry.get("min")}
    return {"metric_name": name, "metric_value": entry["value"], "largest": entry.get("max"), **found}


def _shared(run: Mapping[str, Any], record: Row) -> dict[str, Any]:
    """The columns that all rows of a case have in both files."""
    case, effective = record["case"], record["effective"]
    inert = {_axis(name): str(reason) for name, reason in record["inert"].items()}
    return {
        "model": case["model"],
        "device": effective.get("device", case["device"]),
        **{axis: axis_value(case["params"], axis) for axis in AXES},
        "num_runs": max(int(record["rounds"] or 0), 1),
        "max_tokens": max(int(case["workload"].get("max_new_tokens") or record["tokens"].get("generated") or 1), 1),
        "engine": case["engine"],
        "quantization": case["quantization"],
        "dtype": effective.get("dtype", case["dtype"]),
        "status": record["status"],
        "reason": None,
        "inert_axes": inert or None,
        "kvsuite_run_id": _fact(run, "run_id"),
        "case_key": record.get("case_key") or None,
        "schema_version": SCHEMA_VERSION,
        "started_utc": record.get("started_utc") or _fact(run, "started_utc"),
        "host": _fact(run, "environment", "host", "name"),
        "device_name": _fact(run, "environment", "gpu", "name") or _fact(run, "environment", "host", "cpu"),
        "driver": _fact(run, "environment", "gpu", "driver"),
        "kvsuite_version": _fact(run, "kvsuite_version"),
        "torch_version": _fact(run, "environment", "packages", "torch"),
        "git_commit": _fact(run, "environment", "kvsuite", "commit"),
        "model_revision": _fact(record, "model", "revision"),
        "seed": record.get("seed"),
    }


def axis_value(params: Mapping[str, Any], axis: str) -> int:
    """The value of an axis in a case's ``params``: -1 for no window, 0 for no sink.

    Raises
    ------
    ValueError
        If the case says nothing of the axis.
    """
    names = [name for name in (PARAMS[axis], axis) if name in params]
    if not names:
        raise ValueError(f"a design-space case has no {PARAMS[axis]} among its params: {dict(params)}")
    value = params[names[0]]
    if axis == "sliding_window_size":
        return int(value) if value and int(value) > 0 else OFF
    return int(value or 0)


def _axis(name: str) -> str:
    return next((axis for axis, short in PARAMS.items() if name == short), name)


def _memory(record: Row) -> dict[str, float | None]:
    """The memory columns; the engine's own numbers go into the original's, which were the engine's too."""
    memory = record["memory"]
    columns: dict[str, float | None] = {}
    for part in ("total", "params", "kvcache", "temp"):
        columns[f"gpu_mem_{part}_mb"] = _part(memory["reported"], part)
        columns[f"mem_predicted_{part}_mb"] = _part(memory["predicted"], part)
    return columns | {
        "mem_measured_peak_mb": _megabytes(_value(record, "mem_measured_peak_bytes")),
        "mem_measured_params_mb": _megabytes(_value(record, "mem_weights_bytes")),
        "mem_measured_kvcache_mb": _megabytes(memory["measured"].get("kv_bytes_allocated")),
        "kv_exact_mb": _megabytes(_value(record, "kv_bytes_exact")),
    }


#: how the engines' passes call the parts of ``record.memory``
_PARTS = {
    "total": ("total_bytes",),
    "params": ("params_bytes", "weights_bytes"),
    "kvcache": ("kvcache_bytes", "pool_bytes"),
    "temp": ("temp_bytes", "workspace_bytes"),
}


def _part(column: Mapping[str, Any], part: str) -> float | None:
    return _megabytes(next((column[name] for name in _PARTS[part] if column.get(name) is not None), None))


def _megabytes(number: float | None) -> float | None:
    return None if number is None else number / MIB


def _value(record: Row, metric: str) -> float | None:
    return metric_value(dict(record), metric)


def _sample(record: Row, metric: str, number: int) -> float | None:
    """A round's own sample where the record has one for every round, else the headline value."""
    values = (record["metrics"].get(metric) or {}).get("values") or ()
    return float(values[number]) if len(values) == record["rounds"] else _value(record, metric)


def _only(columns: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in columns}


def _fact(document: Mapping[str, Any], *path: str) -> str | None:
    found: Any = document
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else str(found)
