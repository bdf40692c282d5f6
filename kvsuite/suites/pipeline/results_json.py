"""The original benchmark's JSON list: its keys in its order, ours behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.reporting.aggregate import Row, failure, suite_rows, value

from .rows import THROUGHPUT, is_baseline, speedup
from .variants import VARIANTS

RESULTS_FILE = "kvcache_matrix_results.json"
#: metrics behind the original's keys, under their own names
METRICS = (
    "output_tok_s", "total_tok_s_computed", "total_tok_s_logical", "goodput_req_s", "slo_share", "capacity_req_s",
    "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p50_s", "tpot_p90_s", "tpot_p99_s", "itl_p50_s", "itl_p90_s",
    "itl_p99_s", "queue_p50_s", "queue_p90_s", "queue_p99_s", "preemptions", "running_mean", "blocks_peak",
    "compress_prompt_s", "sm_seconds", "energy_j", "energy_output_token_j", "served_perplexity", "served_perplexity_dense",
    "served_ppl_ratio", "served_kld", "served_kld_p99", "served_same_top1",
)  # fmt: skip
_DECISION = (
    "pipeline", "async_compress", "compression_streams", "decode_layers_per_step", "greenctx_enabled", "sm_compress_ratio",
    "sm_main_ratio",
)  # fmt: skip


def results_json(run: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The list: a row for each case, in the order of the space.

    Keys of the original as it defines them: ``throughput_tok_s`` counts prompt and output tokens of all requests, whether they
    were computed or found in the prefix cache, over the wall time; ``prompt_tokens`` is that of the first prompt. A baseline
    has backend and method ``none`` and neither toggles nor speed-up; a failed case has ``error`` in the place of its results.

    Parameters
    ----------
    run
        The run line.
    rows
        Record rows; only those of the pipeline suite are used. Metrics in their own units (s, tok/s, J), means over rounds.

    Raises
    ------
    UserError
        If no row is of the pipeline suite.
    """
    own = suite_rows(rows, "pipeline")
    return [_entry(run, row, own) for row in own]


def _entry(run: Mapping[str, Any], row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    case, workload, params = row["case"], row["case"]["workload"], row["case"]["params"]
    variant = VARIANTS[params["variant"]]
    found: dict[str, Any] = {
        "model": case["model"],
        "workload": workload["workload"],
        "batch_size": workload["batch"],
        "num_batches": workload["num_batches"],
        "backend": "none" if case["policy"] is None else "kvsuite",
        "method": case["policy"] or "none",
        "variant": variant.name,
    }
    ok = row["status"] == "ok"
    if not is_baseline(row):
        requested = (row.get("partition") or {}).get("requested") or {}
        prompt_share, decode_share = _shares(row)
        found |= {
            "auto_tune": variant.controller is not None,
            "greenctx": variant.partitioned,
            "auto_dual": variant.controller == "dual",
            "greenctx_compress_ratio": prompt_share,
            "greenctx_main_ratio": decode_share,
            "greenctx_main_stream": requested.get("decode_bound", variant.partitioned),
        }
        if ok:
            found["speedup_vs_baseline"] = speedup(row, rows)
    if ok:
        found |= _results(row)
    else:
        found["error"] = failure(row)
    return found | _ours(run, row)


def _shares(row: Row) -> tuple[float | None, float | None]:
    """Shares of the prompt lane and of the decode lane: those asked for, else those of the SMs that they were given.

    A controller's are those of its last decision that parted the SMs.
    """
    partition = row.get("partition") or {}
    requested, realised = partition.get("requested") or {}, partition.get("realised") or {}
    if "prompt_ratio" in requested:
        return requested["prompt_ratio"], requested["decode_ratio"]
    given, parts = realised, realised.get("by_share")
    if parts is not None:
        applied = [(one.get("applied") or {}).get("partition") for one in row["samples"].get("decisions") or []]
        given = next((one for one in reversed(applied) if one is not None), {})
        realised = next(iter(parts.values()), {})
    if "prompt_sms" not in given:
        return None, None
    total = realised["device_sms"]
    return round(given["prompt_sms"] / total, 4), round(given["decode_sms"] / total, 4)


def _results(row: Row) -> dict[str, Any]:
    workload, tokens = row["case"]["workload"], row["tokens"]
    requests = row["samples"].get("requests") or [{}]
    walls = [one["wall_s"] for one in row["samples"].get("rounds", ())]
    found: dict[str, Any] = {
        "prompt_tokens": requests[0].get("prompt_tokens", workload["prompt_tokens"]),
        "total_tokens": tokens.get("prompt", 0) + tokens.get("generated", 0),
        "elapsed_s": sum(walls) / len(walls) if walls else None,
        "throughput_tok_s": value(row, THROUGHPUT),
    }
    decisions = [one["decision"] for one in row["samples"].get("decisions") or [] if "decision" in one]
    if decisions:
        found["auto_last_decision"] = {name: decisions[-1].get(name) for name in _DECISION}
    if VARIANTS[row["case"]["params"]["variant"]].partitioned:
        partition = row.get("partition") or {}
        found["greenctx_available"] = partition.get("realised") is not None
        found["greenctx_reason"] = (partition.get("realised") or {}).get("provider")
    return found


def _ours(run: Mapping[str, Any], row: Row) -> dict[str, Any]:
    case, params = row["case"], row["case"]["params"]
    ours: dict[str, Any] = {
        "name": case["name"],
        "case_key": row["case_key"],
        "run_id": run.get("run_id"),
        "engine": case["engine"],
        "device": case["device"],
        "dtype": case["dtype"],
        "quantization": case["quantization"],
        "status": row["status"],
        "policy_params": dict(case["policy_params"]),
        "factor": params["factor"],
        "chunk_tokens": params["chunk"],
        "slo": params["slo"],
        "serving": dict(params["serving"]),
        "partition": row.get("partition"),
        "inert": dict(row["inert"]),
    }
    if "image" in case["workload"]:
        ours["image"] = case["workload"]["image"]
        ours["image_tokens"] = ((row.get("dataset") or {}).get("image") or {}).get("tokens")
    if row["status"] == "ok":
        ours["tokens"] = dict(row["tokens"])
        ours |= {name: value(row, name) for name in METRICS}
        if "capacity" in row["samples"]:
            ours["capacity_rates"] = row["samples"]["capacity"]
    return ours
