"""Memory meters: allocator peaks by phase, resident set, driver. What cannot be known here is null with a reason."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Reading:
    """One number in bytes, or the reason why there is none."""

    value: int | None = None
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Phase:
    """Allocator numbers of one phase (``load``, ``prefill``, ``decode``)."""

    before: Reading = field(default_factory=Reading)
    peak: Reading = field(default_factory=Reading)
    reserved: Reading = field(default_factory=Reading)


class AllocatorMeter:
    """torch's allocator on ``device``: exact on CUDA, not available elsewhere."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.reason = None if device.type == "cuda" else f"torch counts no allocations on {device.type}"

    def settle(self) -> None:
        """Drop garbage and cached blocks, so that a phase starts from what is really alive."""
        gc.collect()
        if self.reason is None:
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """Measure the block; the reading is filled when it ends."""
        reading = Phase()
        if self.reason is not None:
            for item in (reading.before, reading.peak, reading.reserved):
                item.reason = self.reason
            yield reading
            return
        import torch

        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        reading.before.value = torch.cuda.memory_allocated(self._device)
        yield reading
        torch.cuda.synchronize(self._device)
        reading.peak.value = torch.cuda.max_memory_allocated(self._device)
        reading.reserved.value = torch.cuda.max_memory_reserved(self._device)


@contextmanager
def resident_set_peak() -> Iterator[Reading]:
    """Peak resident set of this process over the block, from the kernel's own high-water mark (Linux)."""
    reading = Reading()
    try:
        # "5" resets VmHWM (proc(5)); the mark needs no sampling thread beside the measurement
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        reading.reason = f"the peak resident set cannot be reset here ({error.strerror})"
        yield reading
        return
    yield reading
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            reading.value = int(line.split()[1]) * 1024


def peak_resident_set(group: int) -> Reading:
    """Peak resident set of the processes of a group since their start, added up, by the kernel's marks (Linux).

    Parameters
    ----------
    group
        Process group. Its leader, which starts and guards the others, is left out.
    """
    peaks = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if int(status.parent.name) != group and os.getpgid(int(status.parent.name)) == group:
                lines = status.read_text().splitlines()
                peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        except OSError:  # it ended meanwhile
            continue
    if not peaks:
        return Reading(reason="the peak resident set of another process is known on Linux alone")
    return Reading(sum(peaks))


class DriverMeter:
    """NVML used memory of a CUDA device, sampled by another process and found by the device's UUID.

    The NVML index is not the CUDA index, and a process id means nothing inside a container: the number is the device's use,
    ``scope = "device_delta"`` when the use before the block was taken off.
    """

    def __init__(self, device: Any, *, sample_hz: int = 50) -> None:
        self._device = device
        self._hz = sample_hz

    @contextmanager
    def peak(self) -> Iterator[Reading]:
        """Sample over the block."""
        reading = Reading()
        if self._device.type != "cuda":
            reading.reason = f"NVML knows no {self._device.type} device"
            yield reading
            return
        import torch

        if not torch.cuda.is_available():
            # of an engine in another process, whose torch or TVM sees one
            reading.reason = "this torch sees no CUDA device, and NVML is asked about torch's"
            yield reading
            return
        uuid = device_uuid(self._device)
        command = [sys.executable, "-m", "kvsuite.meters.nvml_sampler", uuid, str(self._hz)]
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stdin, stdout = _pipes(sampler)
        first = stdout.readline().strip()
        try:
            yield reading
        finally:
            stdin.close()
            last = stdout.readline().strip()
            sampler.wait(timeout=10)
            stdout.close()
        if not first.isdigit() or not last.isdigit():
            reading.reason = f"NVML: {first or 'the sampler did not start'}"
            return
        reading.value = int(last)
        reading.facts = {"scope": "device", "sample_hz": self._hz, "before_bytes": int(first)}


def device_uuid(device: Any) -> str:
    """UUID of a CUDA device as NVML spells it (``GPU-…``)."""
    import torch

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout
