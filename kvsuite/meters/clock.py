"""Clocks: stamps in a timed region, read once at the end. Every timed field carries its clock's name."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar


class Clock(ABC):
    """Stamps of one region. `start` begins it, `mark` adds a stamp, `seconds` ends it and gives the stamps since the start."""

    name: ClassVar[str]

    @abstractmethod
    def start(self) -> None:
        """Wait for the device to be idle and set the zero of the region."""

    @abstractmethod
    def mark(self) -> None:
        """Stamp the point that the work submitted so far reaches."""

    @abstractmethod
    def seconds(self) -> list[float]:
        """Seconds from the start to every mark, in order; synchronises the device once where it has to."""


class PerfCounterClock(Clock):
    """Host clock for the CPU, where a call returns when its work is done."""

    name = "perf_counter"

    def __init__(self) -> None:
        self._stamps: list[int] = []

    def start(self) -> None:
        self._stamps = [time.perf_counter_ns()]

    def mark(self) -> None:
        self._stamps.append(time.perf_counter_ns())

    def seconds(self) -> list[float]:
        return [(stamp - self._stamps[0]) / 1e9 for stamp in self._stamps[1:]]


class ClientClock(PerfCounterClock):
    """Host clock at which chunks of a stream reach the client of a server: a chunk is no token."""

    name = "client"


class CudaEventClock(Clock):
    """CUDA events on the current stream: nothing waits for the device until `seconds`.

    Parameters
    ----------
    device
        A ``cuda`` device.
    """

    name = "cuda_event"

    def __init__(self, device: Any) -> None:
        self._device = device
        self._events: list[Any] = []

    def start(self) -> None:
        import torch

        torch.cuda.synchronize(self._device)
        self._events = []
        self.mark()

    def mark(self) -> None:
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def seconds(self) -> list[float]:
        self._events[-1].synchronize()
        return [self._events[0].elapsed_time(event) / 1e3 for event in self._events[1:]]


class SyncedClock(Clock):
    """Host clock that waits for the device at every mark: the only per-token stamps on devices without event timing here.

    Its waits drain the launch queue at every step, so its numbers are not compared with those of other clocks.
    """

    name = "perf_counter_sync_each_step"

    def __init__(self, device: Any) -> None:
        self._device = device
        self._stamps: list[int] = []

    def _wait(self) -> None:
        import torch

        torch.accelerator.synchronize(self._device)

    def start(self) -> None:
        self._wait()
        self._stamps = [time.perf_counter_ns()]

    def mark(self) -> None:
        self._wait()
        self._stamps.append(time.perf_counter_ns())

    def seconds(self) -> list[float]:
        return [(stamp - self._stamps[0]) / 1e9 for stamp in self._stamps[1:]]


class IntervalClock:
    """Adds up the intervals between pairs of calls, ``(True)`` at a begin and ``(False)`` at an end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks = 0
        clock.start()

    def __call__(self, begin: bool) -> None:
        if begin != (self._marks % 2 == 0):
            raise RuntimeError("intervals must not nest")
        self._marks += 1
        self._clock.mark()

    def total(self) -> float:
        """Seconds inside intervals."""
        if not self._marks:
            return 0.0
        stamps = self._clock.seconds()
        return sum(end - begin for begin, end in zip(stamps[::2], stamps[1::2], strict=True))


def clock_for(device: Any) -> Clock:
    """Return the clock for a ``torch.device``."""
    if device.type == "cpu":
        return PerfCounterClock()
    return CudaEventClock(device) if device.type == "cuda" else SyncedClock(device)
