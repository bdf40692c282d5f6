from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest
import torch

from kvsuite.meters import bandwidth
from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.meters.clock import CudaEventClock, PerfCounterClock, SyncedClock, clock_for

CPU = torch.device("cpu")


def test_a_sleep_is_in_the_number() -> None:
    """Of five sleeps of 50 ms the median is within 1 %; a loaded machine may oversleep now and then."""
    clock = PerfCounterClock()
    found = []
    for _ in range(5):
        begin = time.clock_gettime(time.CLOCK_MONOTONIC)
        clock.start()
        time.sleep(0.05)
        clock.mark()
        slept = time.clock_gettime(time.CLOCK_MONOTONIC) - begin
        (seconds,) = clock.seconds()
        assert seconds >= 0.05
        assert seconds <= slept
        found.append(seconds / slept)
    assert median(found) == pytest.approx(1, rel=0.01)


def test_marks_are_counted_from_the_start() -> None:
    clock = PerfCounterClock()
    clock.start()
    clock.mark()
    time.sleep(0.02)
    clock.mark()
    clock.mark()
    first, second, third = clock.seconds()
    assert 0 <= first < second <= third
    assert second - first >= 0.02
    # reading ends nothing that a later reading would miss
    assert clock.seconds() == [first, second, third]


def test_start_begins_a_new_region() -> None:
    clock = PerfCounterClock()
    clock.start()
    clock.mark()
    clock.mark()
    time.sleep(0.02)
    begin = time.perf_counter()
    clock.start()
    clock.mark()
    (only,) = clock.seconds()
    assert only <= time.perf_counter() - begin


def test_the_clock_is_the_devices() -> None:
    assert clock_for(CPU).name == "perf_counter"
    assert isinstance(clock_for(torch.device("cuda", 0)), CudaEventClock)
    assert isinstance(clock_for(torch.device("mps")), SyncedClock)
    names = {clock_for(torch.device(kind)).name for kind in ("cpu", "cuda", "mps")}
    assert len(names) == 3


def test_the_synced_clock_waits_before_every_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []

    def wait(device: Any) -> None:
        waits.append(device)
        time.sleep(0.01)

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    device = torch.device("mps")
    clock = SyncedClock(device)
    clock.start()
    clock.mark()
    clock.mark()
    first, second = clock.seconds()
    assert waits == [device] * 3
    assert first >= 0.01
    assert second >= 0.02


def test_copy_bandwidth_counts_reads_and_writes_of_the_best_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(PerfCounterClock):
        times = iter([0.5, 0.25, 1.0])

        def seconds(self) -> list[float]:
            assert len(super().seconds()) == 1
            return [next(self.times)]

    monkeypatch.setattr(bandwidth, "clock_for", lambda device: Told())
    assert copy_bandwidth(CPU, size_bytes=4096, repeats=3) == 2 * 4096 / 0.25
    monkeypatch.undo()
    # from a byte in ten microseconds to more than any memory moves
    assert 1e5 < copy_bandwidth(CPU, size_bytes=2**20, repeats=3) < 1e14


@pytest.mark.gpu
def test_events_see_the_device_work() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    clock = CudaEventClock(torch.device("cuda", 0))
    cycles = 200_000_000
    # cycles of a card that was idle are longer
    for _ in range(3):
        torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    clock.start()
    torch.cuda._sleep(cycles)
    clock.mark()
    torch.cuda._sleep(cycles)
    clock.mark()
    first, second = clock.seconds()
    # 200 million cycles are 0.1 s at 2 GHz; a launch alone takes microseconds
    assert 0.03 < first < 1
    assert second == pytest.approx(2 * first, rel=0.05)
