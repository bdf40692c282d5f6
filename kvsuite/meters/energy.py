"""Energy that a CUDA device took, by the driver's own counter."""

from __future__ import annotations

import time
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
    """Joules of a whole device between `start` and `stop`, from NVML's counter since the driver was loaded (Volta and later).

    The device is found by its UUID, since NVML's index is not CUDA's. What other processes do on it is in the number, and so
    is what it takes when idle.

    Parameters
    ----------
    device
        A ``torch.device``, or its name.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._found = Energy()
        self._before: int | None = None
        self._begin = 0.0

    def start(self) -> None:
        """Begin, once the device's work is done."""
        self._found, self._before = Energy(), None
        kind = str(self._device).partition(":")[0]
        if kind != "cuda":
            self._found.reason = f"NVML knows no {kind} device"
            return
        try:
            self._before = self._read()
        except (RuntimeError, AssertionError) as error:
            # torch's words where there is no such device: whoever measures on it finds that out by itself
            self._found.reason = str(error).splitlines()[0]
        self._begin = time.perf_counter()

    def stop(self) -> Energy:
        """Energy since `start`, once the device's work is done."""
        found = self._found
        if self._before is None:
            return found
        after, found.seconds = self._read(), time.perf_counter() - self._begin
        if after is None:
            return found
        if found.seconds < SHORTEST_S:
            found.reason = (
                f"{found.seconds:.2f} s were measured, and the driver's counter moves every 0.1 s; raise --kv-rounds to "
                f"measure for {SHORTEST_S:g} s"
            )
        else:
            found.joules = (after - self._before) / 1e3
        return found

    def _read(self) -> int | None:
        """The counter in mJ; ``None`` where the reason has been found."""
        try:
            import pynvml
        except ImportError:
            self._found.reason = "nvidia-ml-py is missing: pip install nvidia-ml-py"
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
            self._found.reason = f"NVML: {error}"
            return None
