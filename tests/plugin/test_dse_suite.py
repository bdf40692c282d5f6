"""The design-space suite as a user runs it, on a small local model: rows, CSVs, figures, table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import Run, copy_benchmarks, run_pytest
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.__main__ import main
from kvsuite.store.validate import validate
from kvsuite.suites.dse.csv_files import METRICS, RESULTS, read_sheet

TAG = "tiny-llama-q4f32_1"
RESULTS_CSV, METRICS_CSV = f"kv_cache_dse_results_{TAG}.csv", f"kv_cache_dse_metrics_{TAG}.csv"
SMALL = (
    "-k", "dse and q4f32", "--kv-device=cpu", "--kv-threads=1", "--kv-quantization=q4f32_1", "--kv-corpus=text.txt",
    "--kv-eval-tokens=100", "--kv-max-new-tokens=4", "--kv-rounds=2", "--kv-num-warmup=1",
)  # fmt: skip
STATUSES = {
    "ctx40-pc8-bs01-swoff-sink0": "ok", "ctx40-pc8-bs01-swoff-sink2": "invalid", "ctx40-pc8-bs01-sw16-sink0": "ok",
    "ctx40-pc8-bs01-sw16-sink2": "ok", "ctx40-pc8-bs01-sw40-sink0": "skipped", "ctx40-pc8-bs01-sw40-sink2": "skipped",
    "ctx40-pc8-bs02-swoff-sink0": "ok", "ctx40-pc8-bs02-swoff-sink2": "invalid", "ctx40-pc8-bs02-sw16-sink0": "ok",
    "ctx40-pc8-bs02-sw16-sink2": "ok", "ctx40-pc8-bs02-sw40-sink0": "skipped", "ctx40-pc8-bs02-sw40-sink2": "skipped",
}  # fmt: skip
SPACE = "--kv-space=ctx=40;chunk=8;batch=1,2;window=off,16,40;sink=0,2"


def project(folder: Path) -> Path:
    copy_benchmarks(folder, "compression", "dse")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pytest(project(tmp_path_factory.mktemp("full")), f"--kv-model={checkpoint}", *SMALL, SPACE, "-rs")


@pytest.fixture(scope="module")
def runs(checkpoint: Path, full: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Short runs that end before anything is drawn."""
    base = tmp_path_factory.mktemp("runs")
    for name in ("foreign", "all invalid", "short text", "hf"):
        project(base / name)
    (base / "foreign" / "reports").mkdir()
    (base / "foreign" / "reports" / RESULTS_CSV).write_text("model,device\na,b\n")
    (base / "short text" / "one.txt").write_text("a")
    one = "--kv-space=ctx=40;chunk=8"
    return {
        name: run_pytest(base / name, f"--kv-model={checkpoint}", *SMALL, *arguments, "-p", "no:benchmark")
        for name, arguments in {
            "foreign": (one,),
            "all invalid": ("--kv-space=ctx=4096;chunk=8,16",),
            "short text": (one, "--kv-corpus=one.txt"),
            "hf": (one, "--kv-engine=hf"),
        }.items()
    }


def run_folder(run: Run) -> Path:
    (only,) = [path for path in run.reports if path.is_dir()]
    return only


def rows(run: Run) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (run_folder(run) / "records.jsonl").read_text().splitlines()[1:]]
    return {row["case"]["name"].removeprefix("q4f32_1-"): row for row in found}


def test_every_point_has_a_valid_record(full: Run) -> None:
    assert full.code == 0, full.out + full.err
    found = rows(full)
    assert {name: row["status"] for name, row in found.items()} == STATUSES
    assert full.said("6 passed, 6 skipped")
    for row in found.values():
        validate("record", row, row["id"])
        assert row["id"] == f"benchmarks/test_dse.py::test_dse[nano-{row['case']['name']}]"
    assert len({row["case_key"] for row in found.values()}) == len(STATUSES)
    assert full.said("skipped: axis inert, same as nano-q4f32_1-ctx40-pc8-bs01-swoff-sink0")
    assert full.said("breaks sink-needs-window: attention_sink_size=2 without a sliding window")
    # the one model is loaded once
    assert len({row["model"]["load_s"] for row in found.values() if row["model"]}) == 1


def test_the_folder_has_every_file(full: Run) -> None:
    folder = run_folder(full)
    assert folder.name.startswith("dse_tiny-llama_")
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"records.jsonl", "report.json", "table.txt", RESULTS_CSV, METRICS_CSV} <= files
    assert {
        f"{TAG}_mem_kvcache_vs_context.png", "throughput_decode_vs_batch.png", "dse_knobs.png", "dse_pareto.png"
    } <= files  # fmt: skip
    assert not {"results.json", "benchmark_comparison.png"} & files, "those are the compression suite's"
    assert {path.name for path in full.reports if not path.name.startswith(".")} == {
        folder.name, RESULTS_CSV, METRICS_CSV,
    }  # fmt: skip
    for name in (RESULTS_CSV, METRICS_CSV):
        assert (full.folder / "reports" / name).read_bytes() == (folder / name).read_bytes()


def test_the_csvs_hold_every_round_every_metric_and_every_reason(full: Run) -> None:
    results, metrics = (read_sheet(run_folder(full) / name) for name in (RESULTS_CSV, METRICS_CSV))
    assert (results.table, metrics.table) == (RESULTS, METRICS)
    assert (results.tag, metrics.tag) == (TAG, TAG)
    finished = [name for name, status in STATUSES.items() if status == "ok"]
    # a row for each of two rounds, one for a case without
    assert len(results.rows) == 2 * len(finished) + (len(STATUSES) - len(finished))
    found = rows(full)
    first = next(row for row in results.rows if row["status"] == "ok" and row["max_batch_size"] == 2)
    record = found["ctx40-pc8-bs02-swoff-sink0"]
    assert first["ttft_s"] == record["metrics"]["ttft_s"]["values"][0]
    assert first["perplexity"] == record["metrics"]["perplexity"]["value"]
    assert first["approx_chars"] == record["samples"]["approx_chars"][0]
    assert (first["prompt_tokens"], first["prefill_tokens_computed"], first["completion_tokens"]) == (40, 40, 8)
    assert first["mem_predicted_kvcache_mb"] == first["gpu_mem_kvcache_mb"] == first["mem_measured_kvcache_mb"]
    reasons = {row["reason"] for row in results.rows if row["run_id"] == 0}
    assert any(reason.startswith("invalid: breaks sink-needs-window") for reason in reasons)
    assert any(reason.startswith("skipped: axis inert, same as") for reason in reasons)
    inert = [row["inert_axes"] for row in results.rows if row["sliding_window_size"] == 40]
    assert all(next(iter(axes)).endswith("_size") for axes in inert if axes)
    names = {row["metric_name"] for row in metrics.rows}
    assert {"prefill_tokens_sum", "decode_step_s", "prefill_steps", "perplexity", "kv_bytes_exact"} <= names


def test_the_table_has_a_line_a_point(full: Run) -> None:
    table = (run_folder(full) / "table.txt").read_text()
    assert table.strip() in full.out
    for name, status in STATUSES.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"q4f32_1-{name} ")]
        assert (status in line) == (status != "ok")
    record = rows(full)["ctx40-pc8-bs02-swoff-sink0"]
    line = next(line for line in table.splitlines() if line.startswith("q4f32_1-ctx40-pc8-bs02-swoff-sink0"))
    assert f"{record['metrics']['perplexity']['value']:.3f}" in line
    assert "window inert: the window never slides: it is no shorter than the context" in table
    assert "4 new tokens for each request, prefix cache off" in table


def test_report_draws_the_run_again(full: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_folder(full)), "--out", str(tmp_path)]) == 0
    assert "12 records: " in capsys.readouterr().out
    for name in ("report.json", "table.txt", RESULTS_CSV, METRICS_CSV, "dse_knobs.png"):
        assert (tmp_path / name).read_bytes() == (run_folder(full) / name).read_bytes(), name


def test_a_csv_that_is_not_ours_is_found_before_anything_is_measured(runs: dict[str, Run]) -> None:
    foreign = runs["foreign"]
    assert foreign.code == pytest.ExitCode.USAGE_ERROR
    assert foreign.said(f"{RESULTS_CSV}: its header is not the one that kvsuite writes")
    assert not [path for path in foreign.reports if path.is_dir()]


def test_a_run_of_which_nothing_can_run_fails_with_the_reason(runs: dict[str, Run]) -> None:
    for name, reason in (
        ("all invalid", "breaks within-trained-length: context_window_size=4096 is more than the 64 positions"),
        ("hf", "engine hf serves one request at a time; use batch=1, or --kv-engine=nano where it can run the model"),
    ):
        run = runs[name]
        assert run.code == pytest.ExitCode.TESTS_FAILED, run.out
        assert run.said("error: no selected case could run: ")
        assert run.said(reason)
        assert {row["status"] for row in rows(run).values()} == {"invalid"}
        assert RESULTS_CSV in {path.name for path in run.reports}


def test_a_text_without_two_tokens_is_refused(runs: dict[str, Run]) -> None:
    short = runs["short text"]
    assert short.code == pytest.ExitCode.USAGE_ERROR
    assert short.said("--kv-corpus=one.txt: text 1 has no two tokens to score; give a longer text")
