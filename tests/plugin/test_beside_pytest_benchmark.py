"""pytest-benchmark sees our timed rounds, and carries our records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import NO_FIGURES, TINY, TINY_NAMES, Run, copy_benchmarks, run_pytest

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def saved(plain: Run) -> dict[str, Any]:
    """The file of ``--benchmark-json``."""
    found: dict[str, Any] = json.loads((plain.folder / "bench.json").read_text())
    return found


@pytest.fixture(scope="module")
def compared(plain: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A second run against the file that the first one saved, quietly."""
    folder = copy_benchmarks(tmp_path_factory.mktemp("compared"), conftest=NO_FIGURES)
    shutil.copytree(plain.folder / ".benchmarks", folder / ".benchmarks")
    return run_pytest(
        folder,
        *TINY,
        "-q",
        "--benchmark-compare",
        "--benchmark-only",
        "-k",
        "streaming or baseline",
        "--kv-strategies=random",
    )


def test_rounds_are_the_option(saved: dict[str, Any]) -> None:
    stats = {bench["name"]: bench["stats"] for bench in saved["benchmarks"]}
    assert set(stats) == {f"test_compression[hf-{name}]" for name in TINY_NAMES}
    assert {(one["rounds"], one["iterations"]) for one in stats.values()} == {(2, 1)}


def test_a_round_holds_the_request_that_the_record_times(saved: dict[str, Any], plain: Run) -> None:
    rows = plain.rows()
    for bench in saved["benchmarks"]:
        ours = rows[bench["param"].removeprefix("hf-")]["samples"]["rounds"]
        for theirs, round_ in zip(bench["stats"]["data"], ours, strict=True):
            # theirs also resets the cache and reads the clock
            assert 0 < round_["e2e_s"] <= theirs


def test_extra_info_has_the_headline(saved: dict[str, Any], plain: Run) -> None:
    rows = plain.rows()
    for bench in saved["benchmarks"]:
        row = rows[bench["param"].removeprefix("hf-")]
        assert bench["extra_info"]["case_key"] == row["case_key"]
        assert bench["extra_info"]["kv_bytes_exact"] == row["metrics"]["kv_bytes_exact"]["value"]
        assert bench["extra_info"]["tpot_s"] == row["metrics"]["tpot_s"]["value"]
        assert bench["extra_info"]["perplexity"] is None


def test_our_section_has_every_row_also_the_failed_ones(saved: dict[str, Any], plain: Run) -> None:
    section = saved["kvsuite"]
    assert section["schema"] == "kvsuite.report/1"
    assert {row["id"]: row for row in section["records"]} == {row["id"]: row for row in plain.lines()[1:]}
    assert section["run"] == plain.lines()[0]
    assert {row["status"] for row in section["records"]} == {"ok", "error", "oom"}


def test_machine_info_claims_no_gpu_on_a_cpu(saved: dict[str, Any]) -> None:
    # null fields would make the machine differ from itself, because pytest-benchmark compares before a device is known
    assert saved["machine_info"]["cpu"]
    assert "gpu" not in saved["machine_info"]


def test_autosave_and_compare(compared: Run) -> None:
    assert compared.code == 0
    assert compared.said("Comparing against benchmarks from: ")
    for name in ("baseline", "streaming_6", "streaming_10"):
        assert compared.said(f"test_compression[hf-{name}] (NOW)")
        assert compared.said(f"test_compression[hf-{name}] (0001_")
    assert not compared.said("that baseline ran on")
    assert len(compared.rows()) == 3


def test_benchmark_only_keeps_our_cases(compared: Run) -> None:
    assert compared.said("3 passed, 2 deselected")


def test_quiet_hides_progress_and_keeps_the_table(compared: Run) -> None:
    assert not compared.said(" elapsed, ")
    assert not compared.said("order seed")
    assert (compared.report / "table.txt").read_text().strip() in compared.out
    assert compared.said("records and figures: reports/streaming_llm_dummy-tiny_")


def test_an_option_that_no_method_reads_is_told(compared: Run, plain: Run) -> None:
    assert compared.said("warning: --kv-strategies: nothing that was selected reads it")
    assert not plain.said("nothing that was selected reads it")


def test_benchmark_only_skips_other_tests(benchmarks: pytest.Pytester) -> None:
    benchmarks.makepyfile(test_other="def test_other(): pass")
    result = benchmarks.runpytest_inprocess("--benchmark-only", "-rs", "test_other.py")
    result.assert_outcomes(skipped=1)


def test_benchmark_skip_skips_our_cases_before_anything_is_measured(benchmarks: pytest.Pytester) -> None:
    result = benchmarks.runpytest_inprocess(*TINY, "--benchmark-skip", "-rs")
    result.assert_outcomes(skipped=5)
    result.stdout.fnmatch_lines(["SKIPPED*5*Skipping benchmark (--benchmark-skip active)."])
    assert not list(Path(benchmarks.path).glob("reports/*"))


def test_a_baseline_of_another_gpu_is_told(plain: Run, tmp_path: Path) -> None:
    folder = copy_benchmarks(tmp_path, conftest=NO_FIGURES)
    shutil.copytree(plain.folder / ".benchmarks", folder / ".benchmarks")
    (file,) = (folder / ".benchmarks").rglob("*.json")
    content = json.loads(file.read_text())
    content["machine_info"]["gpu"] = {"name": "H100"}
    file.write_text(json.dumps(content))
    # stands for a card: what kind it is reaches the plugin through the environment of the run alone
    hook = (
        "def pytest_kvsuite_update_env(config, environment):\n    environment['gpu'] = {'name': 'H200', 'uuid': 'x'}\n"
    )
    (folder / "conftest.py").write_text(NO_FIGURES + hook)
    run = run_pytest(folder, *TINY, "-k", "baseline", "--benchmark-compare", "--benchmark-json=bench.json")
    assert run.code == 0
    (line,) = run.said("warning: --benchmark-compare: that baseline ran on")
    assert "'H100'" in line.partition("this run on")[0]
    assert "'H200'" in line.partition("this run on")[2]
    assert not run.said("machine_info is different"), "said once, by the one who knows"
    gpu = json.loads((folder / "bench.json").read_text())["machine_info"]["gpu"]
    assert gpu == {"name": "H200", "driver": None, "sm_count": None, "memory_bytes": None, "torch_cuda": None}
