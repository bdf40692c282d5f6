"""What cannot run here skips with the reason, and a run in which nothing could run fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, copy_benchmarks, run_pytest


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("vulkan:0", "engine hf cannot use vulkan:0: it runs where torch does (cpu, cuda, mps)"),
        ("cuda:0", "sees no CUDA device; install a CUDA build"),
    ],
)
def test_a_device_that_no_engine_can_use(tmp_path: Path, device: str, reason: str) -> None:
    # nothing but the device, as people type it; no GPU is shown to torch
    run = run_pytest(copy_benchmarks(tmp_path), f"--kv-device={device}", "-rs", CUDA_VISIBLE_DEVICES="")
    assert run.code == pytest.ExitCode.TESTS_FAILED
    assert run.said("7 skipped")
    (line,) = run.said("SKIPPED [7]")
    assert f"skipped: engine hf cannot use {device}" in line
    assert reason in line
    (last,) = run.said("error: no selected case could run: ")
    assert reason in last
    rows = run.rows()
    assert {row["status"] for row in rows.values()} == {"skipped"}
    assert all(reason in row["reason"] for row in rows.values())
    assert json.loads((run.report / "report.json").read_text())["counts"]["skipped"] == 7


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
