"""The pipeline suite as a user runs it, on a small local model: rows, JSON list, CSV, table, resuming, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import Run, copy_benchmarks, run_pytest
from tiny_checkpoint import TEXT, save_checkpoint

from kvsuite.__main__ import main
from kvsuite.reporting.aggregate import value
from kvsuite.store.validate import validate
from kvsuite.suites.pipeline.files import DECISIONS_FILE, pipeline_files
from kvsuite.suites.pipeline.results_json import METRICS, RESULTS_FILE

SMALL = (
    "-k", "pipeline", "--kv-device=cpu", "--kv-threads=1", "--kv-corpus=text.txt", "--kv-rounds=2", "--kv-num-warmup=1",
    "--kv-synthetic-context=32", "--kv-synthetic-output=8", "--kv-chunk-sizes=16", "--kv-pipeline-batch-sizes=4",
)  # fmt: skip
LONG = "synthetic-long-bs04"
STATUSES = {
    f"{LONG}-baseline": "ok", f"{LONG}-compression-only": "ok", f"{LONG}-chunked-c16": "ok", f"{LONG}-chunked-c16-f5": "ok",
    "synthetic-identical-bs04-baseline": "ok", "synthetic-identical-bs04-compression-only": "ok",
    "synthetic-identical-bs04-chunked-c16": "ok", "synthetic-identical-bs04-chunked-c16-f5": "ok",
    "heavy-trace-bs04-baseline": "invalid", "heavy-trace-bs04-compression-only": "invalid",
    "heavy-trace-bs04-chunked-c16": "invalid", "heavy-trace-bs04-chunked-c16-f5": "invalid",
}  # fmt: skip
#: keys of the original's rows in its order
BASELINE_KEYS = [
    "model", "workload", "batch_size", "num_batches", "backend", "method", "variant", "prompt_tokens", "total_tokens",
    "elapsed_s", "throughput_tok_s",
]  # fmt: skip
VARIANT_KEYS = [
    *BASELINE_KEYS[:7], "auto_tune", "greenctx", "auto_dual", "greenctx_compress_ratio", "greenctx_main_ratio",
    "greenctx_main_stream", "speedup_vs_baseline", *BASELINE_KEYS[7:],
]  # fmt: skip


def project(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    copy_benchmarks(folder, "pipeline")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_pytest(
        project(tmp_path_factory.mktemp("full")), f"--kv-model={checkpoint}", *SMALL, "-rs",
        "--kv-workloads=synthetic-long,synthetic-identical,heavy-trace", "--kv-max-model-len=64",
        "--kv-pipeline-json=matrix.json",
    )  # fmt: skip


def records(run: Run) -> dict[str, dict[str, Any]]:
    """The last row of each case: a resumed run has two of one that it measured again."""
    return {row["case"]["name"]: row for row in run.lines() if row["schema"] == "kvsuite.record/1"}


def listed(path: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(path.read_text())}


def test_every_case_has_a_valid_record_and_what_cannot_be_stops_no_other(full: Run) -> None:
    assert full.code == 0, full.out + full.err
    found = records(full)
    assert {name: row["status"] for name, row in found.items()} == STATUSES
    for row in found.values():
        validate("record", row, row["id"])
        assert row["id"] == f"benchmarks/test_pipeline.py::test_pipeline[nano-{row['case']['name']}]"
    assert len({row["case_key"] for row in found.values()}) == len(STATUSES)
    assert full.said("--kv-workloads=heavy-trace: is made of a trace and none is given")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--kv-pipeline-method=nosuch"], "kvsuite: --kv-pipeline-method=nosuch: unknown policy; known: "),
        (
            ["--kv-variants=triad", "--kv-replay-decisions=nosuch.json"],
            "kvsuite: --kv-replay-decisions=nosuch.json: no such file; name the pipeline_decisions.json of a run",
        ),
    ],
)
def test_an_option_that_no_case_can_be_made_of_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    run = run_pytest(project(tmp_path), "-k", "pipeline", "--kv-model=dummy:tiny", *arguments)
    assert run.code == pytest.ExitCode.USAGE_ERROR
    (said,) = (run.out + run.err).strip().splitlines()
    assert line in said
    assert not run.reports


def test_every_variant_serves_the_same_prompts_in_the_same_pool(full: Run) -> None:
    found = records(full)
    for workload in ("synthetic-long", "synthetic-identical"):
        own = [row for name, row in found.items() if name.startswith(workload)]
        assert len({row["dataset"]["prompts_hash"] for row in own}) == 1
        assert {row["effective"]["num_blocks"] for row in own} == {2 * -(-40 // 16)}
        # each arm had its own warm-up of the timed shape (flaw 7)
        assert all(row["warmup"] == 1 for row in own)
    # one stream for all: what a partition or a controller would change did not happen under another name
    assert all(row["partition"] == {"requested": None, "realised": None} for row in found.values())


def test_decisions_of_a_controller_are_a_file_that_can_be_replayed(full: Run) -> None:
    rows = list(records(full).values())
    assert DECISIONS_FILE not in pipeline_files({}, rows)
    log = [{"schema": "kvsuite.decisions/1"}, {"decision": {"pipeline": "none"}}, {"decision": {"pipeline": "prefill"}}]
    controlled = next(
        row for row in rows if row["case"]["params"]["variant"] == "compression-only" and row["status"] == "ok"
    )
    controlled["samples"]["decisions"] = log
    files = pipeline_files({}, rows)
    assert json.loads(files[DECISIONS_FILE]) == {controlled["case"]["name"]: log}
    (row,) = [one for one in json.loads(files[RESULTS_FILE]) if "auto_last_decision" in one]
    assert (row["name"], row["auto_last_decision"]["pipeline"]) == (controlled["case"]["name"], "prefill")


def test_computed_logical_and_output_tokens_are_apart(full: Run) -> None:
    """Flaw 1: prompts that the prefix cache answers are not throughput of the computer."""
    found = records(full)
    unique, identical = found[f"{LONG}-baseline"], found["synthetic-identical-bs04-baseline"]
    for row in (unique, identical):
        tokens = row["tokens"]
        assert (tokens["prompt"], tokens["generated"]) == (4 * 32, 4 * 8)
        assert (
            tokens["prefill_computed"] + tokens["prefix_hits"] == tokens["prompt"]
            or row["metrics"]["preemptions"]["value"]
        )
    assert unique["tokens"]["prefix_hits"] == 0
    assert identical["tokens"]["prefix_hits"] > 0
    ratio = {
        name: row["metrics"]["total_tok_s_logical"]["value"] / row["metrics"]["total_tok_s_computed"]["value"]
        for name, row in (("unique", unique), ("identical", identical))
    }
    assert ratio["identical"] > ratio["unique"]


def test_the_served_continuation_is_compared_with_the_full_cache(full: Run) -> None:
    found = records(full)
    dense, less = (found[f"{LONG}-{name}"]["metrics"] for name in ("baseline", "compression-only"))
    assert dense["served_kld"]["value"] == pytest.approx(0, abs=1e-5)
    assert dense["served_same_top1"]["value"] == 1
    assert less["served_kld"]["value"] > 1e-5
    assert "one stream" in found[f"{LONG}-compression-only"]["inert"]["stage"]


def test_the_list_has_the_originals_keys_in_its_order_and_ours_behind(full: Run) -> None:
    found = listed(full.report / RESULTS_FILE)
    assert list(found) == list(STATUSES)
    for name, row in found.items():
        if STATUSES[name] != "ok":
            assert row["error"].startswith("invalid: --kv-workloads=heavy-trace")
            assert "throughput_tok_s" not in row
            continue
        expected = BASELINE_KEYS if row["variant"] == "baseline" else VARIANT_KEYS
        assert list(row)[: len(expected)] == expected
        assert set(METRICS) < set(row)
        assert row["total_tokens"] == 4 * 40
        assert row["prompt_tokens"] == 32
    base = found[f"{LONG}-baseline"]
    assert (base["backend"], base["method"]) == ("none", "none")
    less = found[f"{LONG}-compression-only"]
    assert (less["method"], less["auto_tune"], less["greenctx"], less["auto_dual"]) == (
        "streaming_llm",
        False,
        False,
        False,
    )
    assert less["speedup_vs_baseline"] == pytest.approx(less["throughput_tok_s"] / base["throughput_tok_s"])


def test_the_list_that_was_asked_for_and_the_csv_hold_the_same_rows(full: Run) -> None:
    assert (full.folder / "matrix.json").read_bytes() == (full.report / RESULTS_FILE).read_bytes()
    with (full.report / "pipeline_results.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == list(STATUSES)
    found = listed(full.report / RESULTS_FILE)
    assert float(rows[0]["output_tok_s"]) == found[rows[0]["name"]]["output_tok_s"]


def test_the_table_has_a_line_a_case(full: Run) -> None:
    table = (full.report / "table.txt").read_text()
    assert table.strip() in full.out
    speed_of = {name: value(row, "total_tok_s_logical") for name, row in records(full).items() if row["status"] == "ok"}
    for name, status in STATUSES.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        # beside the baseline of its own workload, not of another one
        speed, beside = (speed_of.get(one) for one in (name, re.sub(r"(-bs04)-.*", r"\1-baseline", name)))
        ratios = [] if speed is None or beside is None else [f"{speed / beside:.2f}x"]
        assert (status == "ok") == bool(ratios)
        assert re.findall(r"[0-9]+\.[0-9]{2}x", line) == ratios, name
    assert "4 requests of up to 32 + 8 tokens, arrivals closed, pool of 6 blocks, SLO 1s:25ms" in table


def test_report_draws_the_run_again(full: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(full.report), "--out", str(tmp_path)]) == 0
    assert f"{len(STATUSES)} records: " in capsys.readouterr().out
    for name in ("report.json", "table.txt", RESULTS_FILE, "pipeline_results.csv"):
        assert (tmp_path / name).read_bytes() == (full.report / name).read_bytes(), name


ONE = ("--kv-variants=baseline", "-p", "no:benchmark", "--kv-served-quality=off")


def test_the_list_is_written_after_each_case_and_a_failed_baseline_is_measured_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Flaw 17: a resumed run whose baseline failed has speed-ups once it is there."""
    folder = project(tmp_path / "resumed")
    (folder / "conftest.py").write_text(
        "import json, os, pathlib\n"
        "import pytest\n"
        "from kvsuite.engines.nano.session import NanoSession\n"
        "serve = NanoSession.serve_under_load\n"
        "def failing(self, requests, **kw):\n"
        "    if os.environ.get('BREAK') and self._method.policy is None:\n"
        "        raise RuntimeError('broken for a test')\n"
        "    return serve(self, requests, **kw)\n"
        "NanoSession.serve_under_load = failing\n"
        "@pytest.fixture(autouse=True)\n"
        "def _seen():\n"
        "    yield\n"
        "def pytest_runtest_teardown(item, nextitem):\n"
        "    path = pathlib.Path('matrix.json')\n"
        "    with open('seen.txt', 'a') as seen:\n"
        "        seen.write(f'{len(json.loads(path.read_text())) if path.exists() else 0}\\n')\n"
    )
    arguments = (
        f"--kv-model={checkpoint}", *SMALL, "--kv-variants=compression-only", "--kv-pipeline-json=matrix.json",
        "--kv-served-quality=off", "-p", "no:benchmark",
    )  # fmt: skip
    first = run_pytest(folder, *arguments, BREAK="1")
    assert first.code == pytest.ExitCode.TESTS_FAILED, first.out + first.err
    # a case's row is there before the next case begins
    assert [int(line) for line in (folder / "seen.txt").read_text().split()] == [1, 2]
    found = listed(folder / "matrix.json")
    assert "broken for a test" in found[f"{LONG}-baseline"]["error"]
    assert found[f"{LONG}-compression-only"]["speedup_vs_baseline"] is None
    second = run_pytest(folder, *arguments, "--kv-resume=latest")
    assert second.code == 0, second.out + second.err
    assert {name: row["status"] for name, row in records(second).items()} == {
        f"{LONG}-baseline": "ok", f"{LONG}-compression-only": "ok",
    }  # fmt: skip
    found = listed(folder / "matrix.json")
    assert list(found) == [f"{LONG}-baseline", f"{LONG}-compression-only"]
    assert found[f"{LONG}-compression-only"]["speedup_vs_baseline"] > 0
    # a variant more: it alone is measured
    third = run_pytest(folder, *arguments, "--kv-variants=chunked", "--kv-resume=latest")
    assert third.code == 0, third.out + third.err
    assert third.said("2 passed")
    assert set(records(third)) == {*found, f"{LONG}-chunked-c16", f"{LONG}-chunked-c16-f5"}
    assert sorted(listed(folder / "matrix.json")) == sorted(records(third))
    # a case of that name that was served otherwise is not the one that is asked for
    [kept] = (folder / "reports").glob("*/records.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for row in lines:
        if "case" in row:
            row["case"]["params"]["serving"]["max_num_seqs"] += 1
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fourth = run_pytest(folder, *arguments, "--kv-resume=latest")
    assert fourth.code == pytest.ExitCode.USAGE_ERROR, fourth.out
    assert fourth.said("params.serving.max_num_seqs: then 5, now 4"), fourth.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kv-variants=greenctx",), "--kv-variants=greenctx: use baseline, compression-only"),
        (("--kv-gpu-mem-util=0.9",), "--kv-gpu-mem-util: a share of what happens to be free"),
        (("--kv-qwen3-8b=models",), "--kv-qwen3-8b: a folder is a model's name like any other; use --kv-model=FOLDER"),
        (("--kv-pipeline-json=nowhere/list.json",), "--kv-pipeline-json="),
    ],
)
def test_what_no_run_can_be_made_of_is_a_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    run = run_pytest(project(tmp_path / "one"), "--kv-model=dummy:tiny", *SMALL, *arguments)
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.said(said), run.out + run.err
    assert not run.reports


def test_what_a_case_lacks_is_its_reason_and_the_sweep_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    folder = project(tmp_path / "bad")
    (folder / "wrong.csv").write_text("Context,Generated\n2000,300\n")
    run = run_pytest(
        folder, f"--kv-model={checkpoint}", *SMALL, *ONE, "--kv-workloads=heavy-trace,synthetic-long",
        "--kv-trace-conv=wrong.csv",
    )  # fmt: skip
    found = records(run)
    assert {name: row["status"] for name, row in found.items()} == {
        "heavy-trace-bs04-baseline": "invalid", f"{LONG}-baseline": "ok",
    }  # fmt: skip
    assert "no column ContextTokens nor GeneratedTokens" in found["heavy-trace-bs04-baseline"]["reason"]
    plans = run_pytest(folder, f"--kv-model={checkpoint}", *SMALL, "--kv-plan")
    assert plans.code == 0
    assert plans.said(f"{LONG}-compression-only")
    serving = run_pytest(folder, "--kv-model=dummy:tiny", *SMALL, *ONE, "--kv-engine=hf")
    assert serving.said("serves all requests at once, not by their arrivals; use --kv-engine=nano")
