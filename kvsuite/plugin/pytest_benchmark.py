"""Hooks of pytest-benchmark: records in its storage, and on which GPU a baseline ran. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from .reporter import REPORTER
from .stash import RUNNER, SAVED_GPUS


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    reporter = config.stash.get(REPORTER, None)
    if reporter is not None and reporter.rows:
        output_json["kvsuite"] = {"schema": "kvsuite.report/1", "run": reporter.run, "records": reporter.rows}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    gpu = _gpu(config)
    if gpu:
        machine_info["gpu"] = gpu


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> Generator[None]:
    # pytest-benchmark compares while pytest starts, before anything may touch a GPU: ours is compared at the end
    saved = compared_benchmark["machine_info"].get("gpu")
    if saved is None or "gpu" in machine_info:
        return (yield)
    config.stash[SAVED_GPUS].append(saved)
    machine_info["gpu"] = saved
    try:
        return (yield)
    finally:
        del machine_info["gpu"]


def _gpu(config: pytest.Config) -> dict[str, Any]:
    """What a GPU is; what changes from run to run would make every machine a new one."""
    runner = config.stash.get(RUNNER, None)
    gpu = {} if runner is None else runner.environment.get("gpu", {})
    return gpu and {key: gpu.get(key) for key in ("name", "driver", "sm_count", "memory_bytes", "torch_cuda")}


def other_gpus(config: pytest.Config) -> list[str]:
    """Warnings about baselines that ran on another GPU."""
    here = _gpu(config)
    others = [saved for saved in config.stash[SAVED_GPUS] if saved != here]
    return [
        f"warning: --benchmark-compare: that baseline ran on {saved}, this run on {here or 'no GPU'}"
        for saved in others
    ]
