"""Energy that a CUDA device took, by the driver's own counter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .memory import device_uuid

#: the counter moves every 20 to 100 ms: an interval shorter than this is known to no better than a tenth
SHORTEST_S = 1.0


@dataclass
class Energy:
    """Joules over ``seconds``, or the reason why they are not known."""

    joules: float | None = None
    reason: str | None = None
    seconds: float = 0.0


class EnergyMeter:
    """Joules of a whole device over a block, from NVML's counter since the driver was loaded (Volta and later).

    The device is found by its UUID, since NVML's index is not CUDA's. What other processes do on it is in the number, and so
    is what it takes when idle.

    Parameters
    ----------
    device
        A ``torch.device``, or its name.
    """

    def __init__(self, device: Any) -> None:
        self._device = device

    @contextmanager
    def over(self) -> Iterator[Energy]:
        """Energy over the block; the device's work is waited for at both ends."""
        found = Energy()
        kind = str(self._device).partition(":")[0]
        if kind != "cuda":
            found.reason = f"NVML knows no {kind} device"
            yield found
            return
        before, begin = self._read(found), time.perf_counter()
        yield found
        after, found.seconds = self._read(found), time.perf_counter() - begin
        if before is None or after is None:
            return
        if found.seconds < SHORTEST_S:
            found.reason = (
                f"{found.seconds:.2f} s were measured, and the driver's counter moves every 0.1 s; raise --kv-rounds to "
                f"measure for {SHORTEST_S:g} s"
            )
        else:
            found.joules = (after - before) / 1e3

    def _read(self, found: Energy) -> int | None:
        """The counter in mJ."""
        try:
            import pynvml
        except ImportError:
            found.reason = "nvidia-ml-py is missing: pip install nvidia-ml-py"
            return None
        import torch

        torch.cuda.synchronize(self._device)
        try:
            pynvml.nvmlInit()
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(device_uuid(torch.device(self._device)))
                return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            finally:
                pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            found.reason = f"NVML: {error}"
            return None
