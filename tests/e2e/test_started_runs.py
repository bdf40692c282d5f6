"""Runs of pytest from nothing: forks share a hash seed, and have loaded modules that a run may have forgotten to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import FEWER_PLUGINS
from pytest_runs import NO_FIGURES, clean_environment, copy_benchmarks

SUITES = ("compression", "dse", "perplexity", "pipeline", "retrieval", "sensitivity")
#: a case of every suite that measures random weights; tests/plugin/test_other_plugins.py starts the compression suite
CASES = {
    "dse": "nano-q4f16_1-ctx512-pc128-bs04-swoff-sink0",
    "pipeline": "nano-synthetic-long-bs04-chunked-c64",
    "retrieval": "hf-facts4-320-streaming_64",
}


def started(folder: Path, *arguments: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "kvsuite.plugin", *arguments, "--kv-model=dummy:tiny", "--kv-device=cpu"],
        cwd=folder, env=clean_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS=FEWER_PLUGINS, **env),
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_cases_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    folder = copy_benchmarks(tmp_path, *SUITES)
    # sorted: every run has an order of its own
    first, second = (
        sorted(
            line for line in started(folder, "--collect-only", "-q", PYTHONHASHSEED=seed).splitlines() if "::" in line
        )
        for seed in ("1", "2")
    )
    assert len(first) > len(CASES)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("suite", CASES)
def test_a_suite_imports_what_it_needs_and_no_import_warns(tmp_path: Path, suite: str) -> None:
    folder = copy_benchmarks(tmp_path, suite, conftest=NO_FIGURES)
    node = f"benchmarks/test_{suite}.py::test_{suite}[{CASES[suite]}]"
    said = started(folder, node, "-W", "error", "--kv-threads=1", "--kv-rounds=1", "--kv-num-warmup=0")
    assert "1 passed" in said
