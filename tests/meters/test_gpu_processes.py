"""Who else is on the GPU, from what the driver lists."""

from __future__ import annotations

import os

import pytest
import torch

from kvsuite.meters.gpu_processes import GpuProcesses, strangers

OWN = 100


def test_processes_beside_ours_are_named() -> None:
    found = strangers({7: 2**30}, {OWN: 5, 7: 2**30, 8: None}, OWN)
    assert (found.count, dict(found.bytes_by_pid), found.reason) == (2, {7: 2**30, 8: None}, None)
    # one that left while the case ran disturbed it too
    assert strangers({7: 1}, {OWN: 5}, OWN).count == 1
    assert strangers({}, {OWN: 5}, OWN).count == 0


def test_what_an_engine_has_started_for_us_is_ours() -> None:
    found = strangers({}, {OWN: 5, 7: 2**30, 8: 2**20}, OWN, {6, 7})
    assert (found.count, dict(found.bytes_by_pid)) == (1, {8: 2**20})
    # this process need not use the device itself
    assert strangers({}, {7: 2**30}, OWN, {6, 7}).count == 0
    # nor be listed under the number that it knows
    hidden = strangers({}, {4_000_001: 1, 4_000_002: 2}, OWN, {6, 7})
    assert hidden.count is None
    assert "the engine's processes" in str(hidden.reason)


def test_an_engine_of_the_case_before_is_ours_though_it_is_long_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, started = [{OWN: 5, 7: 2**30}, {OWN: 5, 8: 2**30}], [{7}, {8}]
    monkeypatch.setattr(os, "getpid", lambda: OWN)
    monkeypatch.setattr(GpuProcesses, "_look", lambda self: listed.pop(0))
    processes = GpuProcesses("cuda:0", lambda: started.pop(0))
    assert processes.warnings() == []
    assert processes.effective()["gpu_processes"]["foreign"] == 0


def test_in_a_container_they_are_counted() -> None:
    found = strangers({4_000_001: 1}, {4_000_001: 1, 4_000_002: 2}, OWN)
    assert (found.count, dict(found.bytes_by_pid)) == (1, {})
    assert "only counted" in str(found.reason)
    assert strangers({}, {4_000_002: 2}, OWN).count == 0


def test_a_driver_that_hides_all_is_no_proof_of_none() -> None:
    found = strangers({}, {}, OWN)
    assert found.count is None
    assert found.reason


def test_a_cpu_has_no_such_list() -> None:
    processes = GpuProcesses("cpu")
    assert processes.effective() == {}
    assert processes.warnings() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_the_device_it_says_why() -> None:
    processes = GpuProcesses("cuda:0")
    assert processes.effective()["gpu_processes"] == {
        "foreign": None,
        "processes": [],
        "reason": "there is no CUDA device",
    }
    assert processes.warnings() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_second_process_on_the_gpu_is_seen() -> None:
    import subprocess
    import sys

    from child_processes import child_process

    torch.ones(1, device="cuda")
    alone = GpuProcesses("cuda:0").effective()["gpu_processes"]
    if alone["foreign"] is None:
        pytest.skip(f"the driver hides processes: {alone['reason']}")
    code = "import sys, torch; x = torch.ones(2**20, device='cuda'); print('ready', flush=True); sys.stdin.read()"
    with child_process([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        processes = GpuProcesses("cuda:0")
        found = processes.effective()["gpu_processes"]
        warnings = processes.warnings()
        other.communicate("")
    # other tests may use the device as well
    assert found["foreign"] >= 1
    if found["processes"]:
        assert other.pid in [one["pid"] for one in found["processes"]]
    assert "foreign process(es) on the GPU" in warnings[0]
    assert os.getpid() not in [one["pid"] for one in found["processes"]]
