"""The retrieval suite as a user runs it, on small models: rows, table, CSV, and what has no quality."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from pytest_runs import Run, copy_benchmarks, run_pytest
from tiny_checkpoint import save_checkpoint

from kvsuite.reporting.aggregate import value

SMALL = ("-k", "retrieval", "--kv-device=cpu", "--kv-threads=1", "--kv-task-samples=2", "-rs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("retrieval")
    copy_benchmarks(folder, "retrieval")
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    return run_pytest(
        folder, f"--kv-model={checkpoint}", *SMALL, "--kv-task=facts4", "--kv-task-lengths=500,690", "--kv-task-depths=0,1",
        "--kv-task-methods=full,recent_only(window=120),snapkv(window=8,keep_ratio=0.2)",
    )  # fmt: skip


def test_scores_stand_beside_the_full_cache_on_the_same_samples(run: Run) -> None:
    rows = {row["case"]["name"]: row for row in run.rows().values() if row["status"] == "ok"}
    assert set(rows) == {
        "facts4-500-full", "facts4-500-recent_only_120", "facts4-500-snapkv_window=8_kr=0.2",
        "facts4-500-snapkv_window=8_kr=0.2_question_seen",
    }  # fmt: skip
    full = rows["facts4-500-full"]
    assert value(full, "retrieval_logprob_diff") is None
    for name, row in rows.items():
        assert row["dataset"] == full["dataset"]
        answers = row["samples"]["answers"]
        assert value(row, "retrieval_logprob") == pytest.approx(fmean(one["logprob"] for one in answers))
        assert value(row, "retrieval_logprob_full") == pytest.approx(value(full, "retrieval_logprob"))
        assert [cell["depth"] for cell in row["samples"]["cells"]] == [0.0, 1.0]
        if name != "facts4-500-full":
            difference = value(row, "retrieval_logprob_diff")
            assert difference is not None
            assert difference != 0
            assert difference == pytest.approx(value(row, "retrieval_logprob") - value(full, "retrieval_logprob"))
    assert value(rows["facts4-500-recent_only_120"], "kv_bytes_exact_prefill") == pytest.approx(
        120 / 500 * value(full, "kv_bytes_exact_prefill")
    )
    kept = [
        value(rows[f"facts4-500-snapkv_window=8_kr=0.2{seen}"], "retrieval_logprob") for seen in ("", "_question_seen")
    ]
    assert kept[0] != kept[1]


def test_a_model_that_does_not_answer_says_nothing_of_its_caches(run: Run) -> None:
    row = next(row for row in run.rows().values() if row["case"]["name"] == "facts4-500-recent_only_120")
    assert row["metrics"]["retrieval_exact"]["discriminative"] is False
    assert "not discriminative: the full cache answers 0.00 exactly, less than --kv-task-bound=0.3" in row["warnings"]
    assert "~0.00" in run.out
    assert "~ not discriminative" in run.out


def test_a_length_beyond_the_model_is_a_line(run: Run) -> None:
    rows = [row for row in run.rows().values() if row["case"]["workload"]["prompt_tokens"] == 690]
    assert {row["status"] for row in rows} == {"invalid"}
    assert rows[0]["metrics"] == {} or value(rows[0], "retrieval_exact") is None
    assert "--kv-task-lengths=690: with " in run.out
    assert "that is more than the 700 that the model takes; give shorter contexts" in " ".join(run.out.split())


def test_random_weights_have_memory_and_no_scores(tmp_path: Path) -> None:
    copy_benchmarks(tmp_path, "retrieval")
    found = run_pytest(tmp_path, "--kv-model=dummy:tiny", *SMALL, "--kv-task=copy", "--kv-task-lengths=64",
                       "--kv-task-methods=full,recent_only(window=16)")  # fmt: skip
    assert found.code == 0, found.out
    rows = {row["case"]["name"]: row for row in found.rows().values()}
    for row in rows.values():
        assert row["metrics"]["retrieval_exact"]["value"] is None
        assert row["metrics"]["retrieval_exact"]["reason"] == "random weights"
        assert "nothing is asked" in row["inert"]["task"]
        assert value(row, "ttft_s") is not None
    bytes_of = [value(rows[f"copy-64-{name}"], "kv_bytes_exact_prefill") for name in ("full", "recent_only_16")]
    assert bytes_of[0] == 4 * bytes_of[1]
    shutil.rmtree(tmp_path)


def test_requests_in_turn_find_their_context_again_and_answer_alike(tmp_path: Path) -> None:
    copy_benchmarks(tmp_path, "retrieval")
    found = run_pytest(tmp_path, "--kv-model=dummy:tiny", *SMALL, "--kv-task=reuse", "--kv-task-lengths=64",
                       "--kv-task-methods=full,streaming_llm(start_size=2,recent_size=14),snapkv(window=8)")  # fmt: skip
    assert found.code == 0, found.out
    rows = {row["case"]["name"]: row for row in found.rows().values()}
    refused = rows.pop("reuse-64-snapkv_window=8")
    assert (refused["status"], "leave prefix caching off" in refused["reason"]) == ("invalid", True)
    assert set(rows) == {"reuse-64-full", "reuse-64-streaming_16"}
    for name, row in rows.items():
        assert row["case"]["engine"] == "nano"
        # blocks of 16 tokens
        assert value(row, "reuse_hit_tokens") == 64
        requests = row["samples"]["reuse"]
        assert [one["hit_tokens"] for one in requests] == [0, 64, 64] * 2
        assert value(row, "reuse_differing") == sum(one["warm"] != one["cold"] for one in requests) == 0
        assert row["metrics"]["retrieval_exact"]["reason"] == "random weights"
        assert row["metrics"]["ttft_s"]["n"] == row["metrics"]["ttft_cached_s"]["n"] == 2
        assert (requests[0]["stored_tokens"] < 64) is ("streaming" in name)
    assert "Requests in turn" in found.out


def test_a_file_of_ruler_has_its_own_rows_table_and_pairs(tmp_path: Path) -> None:
    copy_benchmarks(tmp_path, "retrieval")
    checkpoint = save_checkpoint(tmp_path / "tiny-llama")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 700}))
    line = {"index": 0, "input": f"{'The grass is green. ' * 8}\nWhat is green?", "outputs": ["e", "zq"], "length": 300}
    (tmp_path / "vt.jsonl").write_text("".join(json.dumps(line | {"index": at}) + "\n" for at in range(3)))
    run = run_pytest(tmp_path, f"--kv-model={checkpoint}", *SMALL, f"--kv-tasks-path={tmp_path / 'vt.jsonl'}",
                     "--kv-task-methods=full,recent_only(window=40)", "--kv-task-bound=0")  # fmt: skip
    assert run.code == 0, run.out
    rows = {row["case"]["name"]: row for row in run.rows().values()}
    assert set(rows) == {"ruler_vt-full", "ruler_vt-recent_only_40"}
    full, recent = rows["ruler_vt-full"], rows["ruler_vt-recent_only_40"]
    assert value(full, "task_kept_tokens") == value(full, "task_context_tokens") == 160
    assert value(recent, "task_kept_tokens") == 40
    assert full["dataset"] == recent["dataset"]
    assert recent["samples"]["ruler"] | {"file": ""} == {
        "file": "", "score": "string_match_all", "max_new_tokens": 30, "samples": 2, "samples_of": 3, "prompts_cut": 0,
        "full": None,
    }  # fmt: skip
    for row in rows.values():
        scores = [one["score"] for one in row["samples"]["answers"]]
        assert value(row, "task_score") == fmean(scores)
        assert value(row, "task_score_full") == value(full, "task_score")
    assert full["metrics"]["task_score_diff"]["reason"] == "this is the reference"
    assert value(recent, "kv_bytes_exact_prefill") == value(full, "kv_bytes_exact_prefill") / 4
    assert "Published task" in run.out
    assert "Score-Full" in run.out


def test_random_weights_are_refused_where_a_task_would_be_scored(tmp_path: Path) -> None:
    copy_benchmarks(tmp_path, "retrieval")
    (tmp_path / "vt.jsonl").write_text(json.dumps({"index": 0, "input": "Some.\nWhat?", "outputs": ["a"]}) + "\n")
    run = run_pytest(tmp_path, "--kv-model=dummy:tiny", *SMALL, "--kv-tasks-path=vt.jsonl", "--kv-task-methods=full")
    [row] = run.rows().values()
    assert (row["status"], row["metrics"]) == ("invalid", {})
    assert "random weights, so the answers of a task say nothing" in row["reason"]
    broken = tmp_path / "vt.jsonl"
    broken.write_text(broken.read_text() + "{")
    told = run_pytest(tmp_path, "--kv-model=dummy:tiny", *SMALL, "--kv-tasks-path=vt.jsonl")
    assert told.code == 4
    assert "--kv-tasks-path=vt.jsonl: line 2 is no JSON" in told.out + told.err
