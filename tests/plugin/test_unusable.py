"""What cannot run here skips with the reason, and a run in which nothing could run fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, copy_benchmarks, run_pytest


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (
            ["--kv-device=vulkan:0"],
            ["engine hf cannot use vulkan:0: it runs where torch does (cpu, cuda, mps); use --kv-device=cpu", "wheels"],
        ),
        (["--kv-device=cuda:0"], ["sees no CUDA device; install a CUDA build", "or use --kv-device=cpu"]),
        (["--kv-device=cuda", "-n2"], ["sees no CUDA device; install a CUDA build", "or use --kv-device=cpu"]),
        (["--kv-engine=mlc"], ["no mlc_llm in ", "or name another environment's interpreter with --kv-mlc-python"]),
    ],
)
def test_where_nothing_can_run_one_line_says_so_and_nothing_is_made(
    tmp_path: Path, options: list[str], reasons: list[str]
) -> None:
    # nothing but the device, as people type it; no GPU is shown to torch
    run = run_pytest(copy_benchmarks(tmp_path), *options, CUDA_VISIBLE_DEVICES="")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    (line,) = run.said("kvsuite: ")
    assert "no selected case can run here: " in line
    assert all(reason in line for reason in reasons)
    assert not run.said("collected")
    assert not list(tmp_path.rglob("*.csv"))
    assert not list(tmp_path.rglob("records.jsonl"))


def test_a_selection_that_cannot_run_is_told_before_a_folder_is_made(tmp_path: Path) -> None:
    # cases of the other suites could run there
    conftest = "import kvsuite.engines.hf.engine as hf\n\nhf.HfEngine.unavailable = lambda self, device: None\n"
    run = run_pytest(copy_benchmarks(tmp_path, "dse", conftest=conftest), "--kv-device=vulkan:0")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    (line,) = run.said("no selected case can run here: ")
    assert "engine mlc: no mlc_llm" in line
    assert line.endswith("--kv-mlc-python")
    assert not list(tmp_path.rglob("records.jsonl"))


def test_missing_optional_packages_skip_their_cases_only(tmp_path: Path) -> None:
    missing = "kvpress mlc_llm tvm sgl_kernel nanovllm bitsandbytes seaborn pynvml flashinfer"
    conftest = f"import sys\n\nsys.modules.update(dict.fromkeys({missing.split()}))\n{NO_FIGURES}"
    folder = copy_benchmarks(tmp_path, conftest=conftest)
    options = ("--kv-method=streaming_llm,kvpress:SnapKV", "--kv-recent-sizes=4", "--kv-keep-ratios=0.5")
    run = run_pytest(folder, *TINY, *options, "-rs", "-W", "error")
    assert run.code == 0
    assert run.said("3 passed, 1 skipped")
    (line,) = run.said("SKIPPED [1]")
    assert "kvpress" in line
    assert "pip install" in line
    assert {name: row["status"] for name, row in run.rows().items()} == {
        "baseline": "ok",
        "recent_only_6": "ok",
        "streaming_6": "ok",
        "SnapKV_kr=0.5": "skipped",
    }
