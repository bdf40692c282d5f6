from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kvsuite import __version__
from kvsuite.meters.environment import fingerprint, gpu_facts, host_facts


def environment() -> dict[str, Any]:
    return {
        "kvsuite": {"version": __version__, "commit": "a" * 40, "dirty": False},
        "host": {
            "name": "box-1", "os": "Linux", "release": "6.1", "machine": "x86_64", "cpu": "CPU 9000", "cores": 8,
            "ram_bytes": 64 << 30, "container": False,
        },
        "python": "3.12.1",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.1.0"},
        "variables": {},
        "command": ["pytest"],
        "gpu": {
            "name": "GPU", "sm_count": 132, "memory_bytes": 80 << 30, "driver": "570.1", "power_limit_w": 700.0,
            "torch_cuda": "13.0", "uuid": "sha256:1", "temperature_c": 40, "sm_clock_mhz": 1980, "processes": 0,
        },
    }  # fmt: skip


def hashed(facts: dict[str, Any], *, engine: str = "hf", versions: dict[str, str] | None = None) -> str:
    return fingerprint(facts, engine=engine, versions=versions or {"transformers": "5.2.0"})


def changed(path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(environment())
    *way, last = path.split(".")
    at: Any = result
    for name in way:
        at = at[name]
    at[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value"),
    [("gpu.name", "other"), ("gpu.sm_count", 66), ("gpu.memory_bytes", 1), ("gpu.driver", "580"),
     ("gpu.power_limit_w", 350.0), ("gpu.torch_cuda", "12.8"), ("packages.torch", "2.11.0"),
     ("host.os", "Darwin"), ("host.cpu", "CPU 1"), ("host.cores", 2)],
)  # fmt: skip
def test_what_decides_speed_is_in_the_fingerprint(path: str, value: Any) -> None:
    assert hashed(changed(path, value)) != hashed(environment())


@pytest.mark.parametrize(
    ("path", "value"),
    [("gpu.uuid", "sha256:2"), ("gpu.temperature_c", 80), ("gpu.sm_clock_mhz", 300), ("gpu.processes", 4),
     ("host.name", "box-2"), ("host.ram_bytes", 1), ("host.release", "6.2"), ("kvsuite.commit", "b" * 40),
     ("packages.numpy", "2.2.0"), ("command", ["pytest", "-x"]), ("variables", {"OMP_NUM_THREADS": "1"})],
)  # fmt: skip
def test_what_names_one_machine_or_moment_is_not(path: str, value: Any) -> None:
    assert hashed(changed(path, value)) == hashed(environment())


def test_engines_have_their_own_fingerprint() -> None:
    assert hashed(environment()) != hashed(environment(), engine="nano")
    assert hashed(environment()) != hashed(environment(), versions={"transformers": "5.3.0"})
    without = environment()
    del without["gpu"]
    assert hashed(without) != hashed(environment())


def test_host_facts_are_json_and_name_this_machine() -> None:
    import torch
    import transformers

    facts = host_facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["kvsuite"]["version"] == __version__
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["transformers"] == transformers.__version__
    assert facts["host"]["cores"] >= 1
    assert facts["host"]["ram_bytes"] > 1 << 28
    assert facts["host"]["cpu"]
    assert hashed(facts).startswith("sha256:")


def test_secrets_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-for-a-report")
    monkeypatch.setenv("KV_SECRET", "not-for-a-report")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = host_facts()
    assert "not-for-a-report" not in json.dumps(facts)
    assert facts["variables"]["OMP_NUM_THREADS"] == "3"


def test_outside_a_checkout_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert host_facts()["working_tree"] == {"commit": None, "dirty": None}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host_facts()["kvsuite"]["commit"] is None


def test_a_cpu_has_no_gpu_facts() -> None:
    import torch

    assert gpu_facts("cpu") == {}
    if not torch.cuda.is_available():
        assert gpu_facts("cuda:0") == {}


@pytest.mark.gpu
def test_gpu_facts_hold_no_serial_number() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    facts = gpu_facts("cuda:0")
    assert facts["name"] == torch.cuda.get_device_name(0)
    assert facts["sm_count"] > 0
    assert facts["memory_bytes"] > 1 << 30
    assert facts.get("uuid", "sha256:").startswith("sha256:")
    assert "driver" in facts
