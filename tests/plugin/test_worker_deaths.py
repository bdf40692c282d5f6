"""Two workers on two GPUs that the CPU stands in for; cases that end them in every way. Each death costs its own case."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hostile_policies import CONFTEST
from pytest_runs import TINY, Run, run_pytest
from sweeps import project

from kvsuite.store.validate import validate

pytest.importorskip("xdist")

METHODS = ("streaming_llm", "segfault", "killed", "cudaerror", "hungry")
FINE = ["baseline", "recent_only_6", "recent_only_10", "streaming_6", "streaming_10"]
DEAD = {"segfault": "SIGSEGV", "killed": "SIGKILL"}
LIMIT = 6
# what takes seconds to load is there before the case begins, and its time does not go into that
PRELOADED = "import torch\nimport transformers.models.llama.modeling_llama\n"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = project(tmp_path_factory.mktemp("deaths"), CONFTEST)
    return run_pytest(
        folder, *TINY, f"--kv-method={','.join(METHODS)}", "-n2", "--junitxml=junit.xml", "-p", "no:cacheprovider",
        KVSUITE_SIMULATED_GPUS="2", CUDA_VISIBLE_DEVICES="6,3",
    )  # fmt: skip


def test_every_case_ends_as_a_row(sweep: Run) -> None:
    assert sweep.code == pytest.ExitCode.TESTS_FAILED
    assert not sweep.said("INTERNALERROR")
    assert {name: row["status"] for name, row in sweep.rows().items()} == {
        **dict.fromkeys(FINE, "ok"), **dict.fromkeys(DEAD, "crashed"), "cudaerror": "error", "hungry": "oom",
    }  # fmt: skip
    assert sweep.said("4 failed, 5 passed")
    for line in sweep.lines():
        validate("run" if line["schema"] == "kvsuite.run/1" else "record", line, "line")


def test_the_row_says_what_killed_the_process_and_in_which_phase(sweep: Run) -> None:
    rows = sweep.rows()
    for name, kind in DEAD.items():
        error = rows[name]["error"]
        assert (error["type"], error["phase"]) == (kind, "memory"), name
        assert rows[name]["reason"] == error["message"]
        assert rows[name]["model"]["label"] == "dummy-tiny", "what was known by then is kept"
    assert "kernel sends it too where memory runs out" in rows["killed"]["reason"]


def test_junit_names_the_dead(sweep: Run) -> None:
    text = (sweep.folder / "junit.xml").read_text()
    root = ElementTree.fromstring(text)
    said = " ".join(message.get("message", "") + (message.text or "") for message in root.iter("error"))
    said += " ".join(message.get("message", "") + (message.text or "") for message in root.iter("failure"))
    for kind in ("SIGSEGV (signal 11)", "SIGKILL (signal 9)"):
        assert kind in said


def test_a_worker_with_a_cuda_error_is_replaced(sweep: Run) -> None:
    assert len(sweep.said("gets a new process: a CUDA error or a timeout")) <= 1
    started = sorted(path.name.split("-")[1] for path in sweep.folder.glob("visible-gw*.txt"))
    # two workers, and one more for every one that died or that a CUDA error left useless, but for the last of each
    assert len(started) >= 2 + len(DEAD)
    assert len(set(started)) == len(started)


def test_each_worker_keeps_its_gpu_and_so_does_the_one_that_replaces_it(sweep: Run) -> None:
    seen = [path.read_text() for path in sweep.folder.glob("visible-gw*.txt")]
    assert set(seen) == {"6", "3"}, "the caller's GPUs, in the caller's words, before torch was loaded"
    rows = sweep.rows()
    environments: dict[str, dict[str, Any]] = {
        line["env"]: line["environment"] for line in sweep.lines() if line["schema"] == "kvsuite.run/1"
    }
    by_gpu = defaultdict(list)
    for name in FINE:
        bound = rows[name]["effective"]["gpu"]
        assert bound["simulated"] is True
        assert environments[rows[name]["env"]]["variables"]["CUDA_VISIBLE_DEVICES"] == bound["visible"]
        assert "simulated GPU: measured on the CPU" in rows[name]["warnings"]
        by_gpu[bound["visible"]].append(name)
    assert set(by_gpu) <= {"6", "3"}
    assert {row["effective"]["concurrent_workers"] for row in rows.values()} == {2}


def test_a_case_that_hangs_in_native_code_is_killed(tmp_path: Path) -> None:
    # nothing but the hanging case, so that a busy machine cannot time another one out
    run = run_pytest(
        project(tmp_path, PRELOADED + CONFTEST), *TINY, "--kv-method=native", "-k", "native", "-n1", f"--kv-timeout={LIMIT}",
        "-p", "no:cacheprovider",
    )  # fmt: skip
    (row,) = run.rows().values()
    assert (run.code, row["status"], row["error"]["type"]) == (pytest.ExitCode.TESTS_FAILED, "crashed", "Timeout")
    assert f"longer than --kv-timeout={LIMIT} s, did not stop within 5 s more" in row["reason"]
    assert row["duration_s"] >= LIMIT
    assert run.said("crashed in memory: timeout: it ran longer than")


def test_more_workers_than_gpus_are_a_usage_error(tmp_path: Path) -> None:
    run = run_pytest(project(tmp_path), *TINY, "-n2", KVSUITE_SIMULATED_GPUS="1")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.said("-n 2: there are 1 GPUs to see (0), and two workers on one would time each other; give -n 1")
    assert not (tmp_path / "reports").exists()
