"""Every suite on engine llamacpp, as a user runs it: statuses, metrics, what is inert, and one line for what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pytest_runs import NO_FIGURES, Run, copy_benchmarks, run_pytest

from kvsuite.engines.llamacpp.library import missing_library

pytestmark = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny dummy on three suites, one process; ``-k`` leaves out weight formats that no GGUF has."""
    folder = copy_benchmarks(
        tmp_path_factory.mktemp("llamacpp"), "compression", "perplexity", "dse", conftest=NO_FIGURES
    )
    return run_pytest(
        folder, "benchmarks", "-p", "no:cacheprovider", "-p", "no:benchmark", "--kv-engine=llamacpp", "--kv-model=dummy:tiny",
        "--kv-threads=1", "--kv-rounds=2", "--kv-num-warmup=1", "--kv-cache-dtype=auto,bf16,q8_0", "--kv-recent-sizes=12",
        "--kv-no-recent-only", "--kv-prompt-tokens=32", "--kv-max-new-tokens=4", "--kv-positions=cache",
        "--kv-space=ctx=300;chunk=64;batch=8 | ctx=300;chunk=64;window=32;sink=4",
        "-k", "compression or dse or (perplexity and none)", f"--kv-cache-dir={folder / 'cache'}",
    )  # fmt: skip


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Of all suites."""
    files = sorted(run.folder.glob("reports/*/records.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if line["schema"] == "kvsuite.record/1"]


def found(run: Run, suite: str, **params: Any) -> dict[str, Any]:
    """The case of a suite with such a name or such parameters."""
    name = params.pop("name", None)
    [row] = [
        row
        for row in rows_of(run)
        if row["case"]["suite"] == suite
        and name in (None, row["case"]["name"])
        and all(row["case"]["params"].get(key) == value for key, value in params.items())
    ]
    return row


def test_it_goes_through_and_says_what_it_ran_on(run: Run) -> None:
    assert run.code == 0, run.out
    rows = rows_of(run)
    assert {row["case"]["engine"] for row in rows} == {"llamacpp"}
    ran = [row for row in rows if row["status"] == "ok"]
    assert {row["effective"]["kv_cache_dtype"] for row in ran} == {"f16", "bf16"}


@pytest.mark.parametrize("name", ["baseline", "streaming_16_poscache", "baseline_bf16"])
def test_stored_bytes_are_the_planned_ones(run: Run, name: str) -> None:
    metrics = found(run, "compression", name=name)["metrics"]
    assert metrics["kv_bytes_exact"]["value"] == metrics["mem_predicted_kv_bytes"]["value"] > 0
    assert metrics["tpot_s"]["value"] > 0
    assert metrics["perplexity"]["reason"] == "random weights"


def test_a_head_that_a_type_does_not_divide_is_invalid_with_one_line(run: Run) -> None:
    row = found(run, "compression", name="baseline_q8_0")
    assert row["status"] == "invalid"
    assert "stores 32 numbers together, and the head size 16" in str(row)


def test_eight_sequences_decode_together_and_inert_axes_are_named(run: Run) -> None:
    batch = found(run, "dse", batch=8, kv_cache_dtype=None)
    assert batch["status"] == "ok"
    assert batch["metrics"]["decode_batch"]["value"] == 8
    assert batch["metrics"]["kv_bytes_exact"]["value"] == batch["metrics"]["mem_predicted_kv_bytes"]["value"]
    window = found(run, "dse", window=32, kv_cache_dtype=None)
    assert {"window", "sink"} <= set(window["inert"])


def test_its_log_stays_out_of_the_terminal(run: Run) -> None:
    assert "llama_" not in run.out + run.err
    assert "ggml" not in run.out + run.err
