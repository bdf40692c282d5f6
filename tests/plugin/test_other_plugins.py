"""The sweep with other plugins off: the same rows, the same exit code, no warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, TINY_NAMES, Run, clean_environment, copy_benchmarks, run_pytest

from kvsuite.store.validate import validate

WITHOUT = {
    "all others": (("-p", "kvsuite.plugin"), {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
    "pytest-benchmark and the cache": (("-p", "no:benchmark", "-p", "no:cacheprovider"), {}),
    "xdist, with pytest-benchmark disabled": (("-p", "no:xdist", "--benchmark-disable"), {}),
}


@pytest.fixture(scope="module", params=WITHOUT.values(), ids=WITHOUT)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    arguments, env = request.param
    folder = copy_benchmarks(tmp_path_factory.mktemp("without"), conftest=NO_FIGURES)
    return run_pytest(folder, *TINY, "-W", "error", *arguments, **env)


def test_it_passes_with_warnings_as_errors(run: Run) -> None:
    assert run.code == 0
    assert run.said("5 passed")


def test_a_process_that_has_loaded_nothing_passes_with_warnings_as_errors(tmp_path: Path) -> None:
    # the runs above are forks of a process that has loaded nearly all modules, without their warnings
    folder = copy_benchmarks(tmp_path, conftest=NO_FIGURES)
    arguments, env = WITHOUT["all others"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *TINY, "-W", "error", *arguments],
        cwd=folder, env=clean_environment(**env), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_a_fork_shows_warnings_as_a_started_process_does(tmp_path: Path) -> None:
    (tmp_path / "test_warning.py").write_text(
        "import sys, warnings\ndef test_it():\n    assert not sys.warnoptions\n    warnings.warn('seen')\n"
    )
    run = run_pytest(tmp_path, "test_warning.py")
    assert run.code == 0, run.out
    assert run.said("UserWarning: seen")


def test_one_valid_row_per_case(run: Run) -> None:
    _, *rows = run.lines()
    assert sorted(row["case"]["name"] for row in rows) == sorted(TINY_NAMES)
    for row in rows:
        validate("record", row, row["id"])
        assert row["metrics"]["ttft_s"]["n"] == 2, "timed rounds do not need pytest-benchmark"


def test_cases_and_bytes_are_those_of_the_full_set(run: Run, plain: Run) -> None:
    full = plain.rows()
    for name, row in run.rows().items():
        assert row["id"] == full[name]["id"]
        assert row["case_key"] == full[name]["case_key"]
        assert row["settings_hash"] == full[name]["settings_hash"]
        for metric in ("kv_bytes_exact", "cache_tokens_mean", "cache_tokens_min", "cache_tokens_max"):
            assert row["metrics"][metric]["value"] == full[name]["metrics"][metric]["value"]


def test_no_table_of_pytest_benchmark(run: Run) -> None:
    assert not run.said("Rounds  Iterations")
    assert run.said("records and figures: reports/streaming_llm_dummy-tiny_")
