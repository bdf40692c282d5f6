"""The design-space suite on engine `mlc` as run by a user, with a stand-in for mlc_llm (mlc_double) or none."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from pytest_runs import Run, copy_benchmarks, run_pytest
from tiny_checkpoint import save_checkpoint

from kvsuite.suites.dse.csv_files import METRICS, RESULTS, read_sheet

ROOT = str(Path(__file__).parents[2])
DOUBLE = str(Path(__file__).parents[1] / "engines" / "mlc" / "mlc_double")
TAG = "tiny-llama-q4f16_1"
SMALL = (
    "-k", "dse and q4f16", "--kv-engine=mlc", "--kv-max-new-tokens=8", "--kv-rounds=2", "--kv-num-warmup=1",
    "--kv-space=ctx=48;chunk=16;batch=1,2;window=off,16", "--kv-cache-dir=cache", f"--kv-mlc-python={sys.executable}",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = copy_benchmarks(tmp_path_factory.mktemp("full"), "dse")
    return run_pytest(
        folder,
        f"--kv-model={checkpoint}",
        "--kv-device=vulkan:0",
        *SMALL,
        PYTHONPATH=os.pathsep.join((ROOT, DOUBLE)),
        MLC_DOUBLE="",
    )


def test_a_run_ends_with_records_csvs_and_a_table(full: Run) -> None:
    assert full.code == 0, full.out + full.err
    (folder,) = [path for path in full.reports if path.is_dir()]
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()[1:]]
    assert {row["id"].partition("::")[2]: row["status"] for row in rows} == {
        "test_dse[mlc-q4f16_1-ctx48-pc16-bs01-swoff-sink0]": "ok",
        "test_dse[mlc-q4f16_1-ctx48-pc16-bs01-sw16-sink0]": "skipped",
        "test_dse[mlc-q4f16_1-ctx48-pc16-bs02-swoff-sink0]": "ok",
        "test_dse[mlc-q4f16_1-ctx48-pc16-bs02-sw16-sink0]": "skipped",
    }
    assert "window inert: MLC's configuration of llama models has no such field" in (folder / "table.txt").read_text()
    results = read_sheet(folder / f"kv_cache_dse_results_{TAG}.csv").rows
    measured = [row for row in results if row["run_id"]]
    assert len(measured) == 4
    for row in measured:
        assert (row["engine"], row["device"], row["dtype"]) == ("mlc", "vulkan:0", "float16")
        # the engine's own line, rounded to bytes
        assert row["gpu_mem_kvcache_mb"] == pytest.approx(48.349, abs=1e-6)
        assert row["mem_predicted_total_mb"] > row["mem_predicted_kvcache_mb"] > 48
        assert row["approx_chars"] == row["max_batch_size"] * 14
    names = {row["metric_name"] for row in read_sheet(folder / f"kv_cache_dse_metrics_{TAG}.csv").rows}
    assert {"last_finished_request_ttft_s", "decode_time_by_batch_size_count{batch_size=2}", "engine_ttft_s"} <= names
    assert RESULTS.columns
    assert METRICS.columns
    assert (folder / f"{TAG}_mem_kvcache_vs_context.png").is_file()


def test_without_mlc_llm_nothing_runs_and_the_install_line_is_said(checkpoint: Path, tmp_path: Path) -> None:
    run = run_pytest(
        copy_benchmarks(tmp_path, "dse"), f"--kv-model={checkpoint}", "--kv-device=cpu", *SMALL, PYTHONPATH=ROOT
    )
    assert run.code == pytest.ExitCode.USAGE_ERROR, run.out + run.err
    (line,) = run.said("no selected case can run here: ")
    assert "https://mlc.ai/wheels" in line
    assert run.reports == []
