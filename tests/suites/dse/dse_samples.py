"""Design-space samples: parts of the published CSVs, and records of a runtime on which every axis is live."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from kvsuite.case import Case
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.record import Record
from kvsuite.suites.dse.columns import METRICS, RESULTS, series_tag
from kvsuite.suites.dse.csv_files import CsvSheet, read_sheet
from kvsuite.suites.dse.rows import csv_rows, metric_rows

DATA = Path(__file__).parents[2] / "data" / "dse"
PUBLISHED = Path("/work/shared/data/mlc_dse")
Q4, Q0 = "Llama-3-8B-Instruct-q4f16_1-MLC", "Llama-3-8B-Instruct-q0f16-MLC"
RUN = {
    "run_id": "20261120_101500",
    "kvsuite_version": "0.1.0",
    "started_utc": "2026-11-20T10:15:00Z",
    "environment": {
        "host": {"name": "box", "cpu": "a CPU"},
        "gpu": {"name": "H200", "driver": "580.1"},
        "packages": {"torch": "2.11.0"},
        "kvsuite": {"commit": "abc"},
    },
}
MIB = 2**20


def sheet(kind: str, tag: str = Q4) -> CsvSheet:
    """A part of a published file."""
    return read_sheet(DATA / f"kv_cache_dse_{kind}_{tag}.csv")


def changed(found: CsvSheet, **columns: Any) -> CsvSheet:
    """The sheet with some columns set in all rows."""
    return CsvSheet(found.table, found.tag, found.source, [row | columns for row in found.rows], found.notes)


def record(
    context: int = 256,
    chunk: int = 64,
    batch: int = 1,
    window: int | None = None,
    sink: int = 0,
    quantization: str = "q4f16_1",
    **fields: Any,
) -> dict[str, Any]:
    """A finished case; every number answers to the axes that move it on a real runtime."""
    entry = MetricRegistry().value
    held = min(context, window or context) * batch
    weights = {"q4f16_1": 70, "q0f16": 256}[quantization] * MIB
    kv = held * 3 * 2**10
    tpot = (weights + kv) / 2e10
    ttft = context / 2e4 * (64 / chunk) ** 0.2
    lost = 0.0 if window is None else 4.0 / (1 + sink) + 64 / window
    rounds = [0.99, 1.0, 1.02]
    metrics = {
        "ttft_s": entry("ttft_s", [ttft * r for r in rounds]),
        "tpot_s": entry("tpot_s", [tpot * r for r in rounds]),
        "e2e_s": entry("e2e_s", [(ttft + 31 * tpot) * r for r in rounds]),
        "decode_tok_s_agg": entry("decode_tok_s_agg", [batch / tpot / r for r in rounds]),
        "prefill_tok_s_computed": entry("prefill_tok_s_computed", [context / ttft / r for r in rounds]),
        "tpot_floor_s": entry("tpot_floor_s", tpot / 2),
        "perplexity": entry("perplexity", (17.0 if quantization == "q0f16" else 18.0) + lost),
        "kv_bytes_exact": entry("kv_bytes_exact", kv),
        "mem_weights_bytes": entry("mem_weights_bytes", weights),
        "mem_measured_peak_bytes": entry("mem_measured_peak_bytes", weights + kv + chunk * 2**12),
    }
    made = Record(
        case=Case(
            suite="dse", engine="nano", model="SmolLM2", name="point", device="cuda:0", dtype="bfloat16",
            quantization=quantization, workload={"max_new_tokens": 32},
            params={"context": context, "prefill_chunk": chunk, "batch": batch, "window": window, "sink": sink},
        ),
        id=f"b.py::test_dse[nano-{quantization}-{context}-{chunk}-{batch}-{window}-{sink}]",
        case_key=f"{quantization}-{context}-{chunk}-{batch}-{window}-{sink}",
        inert={} if window else {"sink": "no window"},
        metrics=metrics,
        memory={
            "predicted": {"kv_bytes": kv, "weights_bytes": weights, "pool_bytes": kv, "workspace_bytes": chunk * 2**12,
                          "total_bytes": weights + kv + chunk * 2**12},
            "reported": {"pool_bytes": kv},
            "measured": {"kv_bytes_allocated": kv},
        },
        tokens={"prompt": context // 2 * batch, "prefill_computed": context // 2 * batch, "generated": 32 * batch},
        samples={"approx_chars": [150, 151, 152]},
        rounds=3,
    ).to_dict()  # fmt: skip
    return made | fields


def records() -> list[dict[str, Any]]:
    """A small space in two weight formats."""
    windows = [(None, 0), (64, 0), (64, 8), (128, 0), (128, 8)]
    space = product(("q0f16", "q4f16_1"), (256, 512), (64, 128), (1, 4), windows)
    return [record(context, chunk, batch, *window, form) for form, context, chunk, batch, window in space]


def own_sheets(rows: list[dict[str, Any]] | None = None) -> list[CsvSheet]:
    """The sheets of those records, as if written and read again."""
    found = records() if rows is None else rows
    sheets = []
    for table, make in ((RESULTS, csv_rows), (METRICS, metric_rows)):
        by_tag: dict[str, list[dict[str, Any]]] = {}
        for row in make(RUN, found):
            by_tag.setdefault(series_tag(row["model"], row["quantization"]), []).append(row)
        sheets += [CsvSheet(table, tag, f"kv_cache_dse_{table.kind}_{tag}.csv", own) for tag, own in by_tag.items()]
    return sheets
