from __future__ import annotations

import gc
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvsuite.meters import memory
from kvsuite.meters.memory import AllocatorMeter, DriverMeter, resident_set_peak

CPU = torch.device("cpu")
MB = 1_000_000
SIZE = 200 * MB


def resident_now() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def test_defect_01_a_known_allocation_is_seen() -> None:
    gc.collect()
    before = resident_now()
    with resident_set_peak() as reading:
        # mapped by itself: what malloc gives may be resident already, of blocks that tests before have freed
        block = mmap.mmap(-1, SIZE)
        block[::4096] = b"x" * len(range(0, SIZE, 4096))
        block.close()
    assert reading.reason is None
    assert reading.value is not None
    # it is a peak: the block is gone when it is read
    assert resident_now() < before + SIZE / 2
    assert before + 0.98 * SIZE < reading.value < before + 1.2 * SIZE


def test_defect_01_a_tensor_is_seen() -> None:
    gc.collect()
    before = resident_now()
    with resident_set_peak() as reading:
        block = mmap.mmap(-1, SIZE)
        tensor = torch.frombuffer(block, dtype=torch.float32).fill_(1)
        del tensor
        block.close()
    assert reading.value is not None
    assert before + 0.98 * SIZE < reading.value < before + 1.2 * SIZE


def test_an_earlier_peak_is_not_this_blocks() -> None:
    block = bytearray(SIZE)
    block[::4096] = b"x" * len(range(0, SIZE, 4096))
    del block
    gc.collect()
    before = resident_now()
    with resident_set_peak() as reading:
        pass
    assert reading.value is not None
    assert reading.value < before + SIZE / 4


def test_where_the_kernel_refuses_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with resident_set_peak() as reading:
        pass
    assert reading.value is None
    assert "cannot be reset here (No such file or directory)" in str(reading.reason)


def test_on_a_cpu_the_allocator_is_null_and_never_zero() -> None:
    meter = AllocatorMeter(CPU)
    meter.settle()
    with meter.phase() as phase:
        _ = torch.ones(1000)
    for reading in (phase.before, phase.peak, phase.reserved):
        assert reading.value is None
        assert reading.reason == "torch counts no allocations on cpu"


def test_on_a_cpu_the_driver_is_null_and_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a sampler was started"))
    with DriverMeter(CPU).peak() as reading:
        pass
    assert reading.value is None
    assert reading.reason == "NVML knows no cpu device"


def test_of_a_device_that_only_another_process_sees_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a sampler was started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with DriverMeter(torch.device("cuda", 0)).peak() as reading:
        pass
    assert (reading.value, reading.reason) == (None, "this torch sees no CUDA device, and NVML is asked about torch's")


def test_a_reason_is_there_before_the_block_runs() -> None:
    # a block that fails leaves a reading that says why
    with pytest.raises(ZeroDivisionError), AllocatorMeter(CPU).phase() as phase:
        _ = 1 / 0
    assert phase.peak.reason


def test_the_sampler_says_what_is_wrong() -> None:
    """Without NVML (or with a wrong UUID) its first line is a reason and not a number."""
    done = subprocess.run(
        [sys.executable, "-m", "kvsuite.meters.nvml_sampler", "GPU-nothing", "50"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first = done.stdout.splitlines()[0]
    assert not first.isdigit()
    assert "nvidia-ml-py" in first or "NVML" in first or "GPU-nothing" in first


@pytest.mark.gpu
def test_defect_01_an_allocation_on_the_device_is_seen() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    meter = AllocatorMeter(device)
    meter.settle()
    with meter.phase() as first:
        block = torch.empty(SIZE, dtype=torch.uint8, device=device)
        del block
    with meter.phase() as second:
        pass
    assert first.before.value is not None
    assert first.peak.value is not None
    assert second.peak.value is not None
    assert SIZE <= first.peak.value - first.before.value < 1.02 * SIZE
    # the second phase starts from what is alive, not from the first one's peak
    assert second.peak.value == second.before.value == first.before.value


@pytest.mark.gpu
def test_the_driver_sees_an_allocation_of_this_process() -> None:
    pytest.importorskip("pynvml")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    import time

    with DriverMeter(device).peak() as reading:
        block = torch.ones(2_000 * MB, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        time.sleep(0.2)
        del block
        torch.cuda.empty_cache()
    assert reading.value is not None, reading.reason
    assert reading.value - reading.facts["before_bytes"] >= 1_900 * MB
