"""Who else computes on the GPU while a case runs, as the driver tells it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

_MIB = 1 << 20


@dataclass(frozen=True)
class Strangers:
    """Processes on a GPU that are not ours.

    Parameters
    ----------
    count
        How many; ``None`` where the driver does not say.
    bytes_by_pid
        Their memory, ``None`` where it is not told; empty where their numbers are hidden.
    reason
        Why ``count`` is not known, or the processes are not named.
    """

    count: int | None
    bytes_by_pid: Mapping[int, int | None]
    reason: str | None = None


def strangers(
    before: Mapping[int, int | None], after: Mapping[int, int | None], own: int, engine: Collection[int] = ()
) -> Strangers:
    """Tell foreign processes from ours.

    Parameters
    ----------
    before, after
        Bytes by process id that the driver lists on the device when a case begins and when it ends; by then this process uses
        the device.
    own
        Id of this process, as it knows it.
    engine
        Ids of the processes that an engine has started for us.
    """
    ours = {own, *engine}
    if not after:
        return Strangers(None, {}, "the driver lists no process here, not even this one")
    if ours & after.keys():
        foreign = {pid: size for pid, size in {**before, **after}.items() if pid not in ours}
        return Strangers(len(foreign), foreign)
    # in a container the driver's numbers are those of the host, and one of them is ours
    if engine:
        return Strangers(
            None, {}, "the engine's processes are listed under other numbers, so foreign ones cannot be told"
        )
    hidden = "this process is listed under another number, so the foreign ones are only counted"
    return Strangers(max(len(after), len(before)) - 1, {}, hidden)


class GpuProcesses:
    """Looks at a device when it is made and when it is asked; says nothing of devices that are no CUDA ones.

    Parameters
    ----------
    device
        Name of the device.
    engine_pids
        Ids of the processes that engines have started for us, those that were ended included.
    """

    def __init__(self, device: str, engine_pids: Callable[[], Collection[int]] = tuple) -> None:
        self._device = device
        self._engine_pids = engine_pids
        # an engine's process ends when the next one starts, and is forgotten by the time that it is asked for
        self._engine_before = frozenset(engine_pids())
        self._before = self._look()
        self._found: Strangers | None = None

    def effective(self) -> dict[str, Any]:
        """Facts for ``Record.effective``."""
        found = self._judge()
        if found is None:
            return {}
        processes = [{"pid": pid, "bytes": size} for pid, size in found.bytes_by_pid.items()]
        return {"gpu_processes": {"foreign": found.count, "processes": processes, "reason": found.reason}}

    def warnings(self) -> list[str]:
        """What a reader of the times must know."""
        found = self._judge()
        if found is None or not found.count:
            return []
        named = ", ".join(
            f"pid {pid}" + ("" if size is None else f" with {size / _MIB:.0f} MiB")
            for pid, size in found.bytes_by_pid.items()
        )
        return [
            f"{found.count} foreign process(es) on the GPU{f' ({named})' if named else ''}: its times are those of a shared GPU"
        ]

    def _judge(self) -> Strangers | None:
        if self._before is not None and self._found is None:
            after = self._look()
            if isinstance(self._before, str) or after is None or isinstance(after, str):
                reason = self._before if isinstance(self._before, str) else str(after)
                self._found = Strangers(None, {}, reason)
            else:
                # asked now: what was ended since the begin is still among them
                self._found = strangers(
                    self._before, after, os.getpid(), self._engine_before.union(self._engine_pids())
                )
        return self._found

    def _look(self) -> dict[int, int | None] | str | None:
        """Bytes by process, or why they are not known; ``None`` for a device without such a list."""
        if not self._device.startswith("cuda"):
            return None
        try:
            import pynvml
        except ImportError:
            return "nvidia-ml-py is missing: pip install nvidia-ml-py"
        if not _cuda_works():
            return "there is no CUDA device"
        import torch

        from .memory import device_uuid

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(device_uuid(torch.device(self._device)))
            listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
            return f"NVML: {error}"
        return {int(one.pid): one.usedGpuMemory for one in listed}


def _cuda_works() -> bool:
    import torch

    try:
        return torch.cuda.is_available()
    except RuntimeError:
        return False
