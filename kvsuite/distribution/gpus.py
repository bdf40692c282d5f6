"""One worker, one GPU: which GPUs the caller lets us see, and binding a process to one of them. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvsuite.errors import UserError
from kvsuite.options.devices import resolve_device

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: test switch: so many GPUs are pretended, and their cases run on the CPU
SIMULATED = "KVSUITE_SIMULATED_GPUS"
_DEV = Path("/dev")


@dataclass(frozen=True)
class Gpus:
    """GPUs that workers are spread over.

    Parameters
    ----------
    entries
        What ``CUDA_VISIBLE_DEVICES`` calls them: numbers or UUIDs.
    simulated
        Whether the CPU stands in for them.
    """

    entries: tuple[str, ...]
    simulated: bool = False

    def of(self, slot: int) -> str:
        """The GPU of a worker's slot."""
        return self.entries[slot]


def gpus_for(device: str) -> Gpus | None:
    """GPUs over which workers are spread, ``None`` where they are not.

    Parameters
    ----------
    device
        ``--kv-device`` as typed: ``cuda`` and ``auto`` mean all GPUs, ``cuda:1`` means that one.

    Raises
    ------
    UserError
        If the switch for simulated GPUs is no number, or comes with a real one.
    """
    simulated = os.environ.get(SIMULATED)
    resolved = resolve_device(device)
    if simulated:
        if not simulated.isdecimal() or int(simulated) < 1:
            raise UserError(f"{SIMULATED}={simulated}: must be a number of GPUs, for example {SIMULATED}=2")
        if resolved != "cpu":
            raise UserError(f"{SIMULATED}={simulated}: simulated GPUs are CPUs; give --kv-device=cpu, or unset it")
        return Gpus(visible_entries(int(simulated)), simulated=True)
    if not resolved.startswith("cuda"):
        return None
    return Gpus(visible_entries(gpu_count()) if device in ("auto", "cuda") else (named_entry(resolved),))


def visible_entries(count: int, listed: str | None = None) -> tuple[str, ...]:
    """What the caller lets this process see, as CUDA reads it.

    Parameters
    ----------
    count
        GPUs of the machine, which are numbered where ``CUDA_VISIBLE_DEVICES`` is not set.
    listed
        Value of ``CUDA_VISIBLE_DEVICES``; ``None`` for this process's.
    """
    listed = os.environ.get(VISIBLE) if listed is None else listed
    if listed is None:
        return tuple(map(str, range(count)))
    entries: list[str] = []
    for entry in (part.strip() for part in listed.split(",")):
        # CUDA ignores everything from the first entry that is no device
        if not entry or entry.startswith("-") or entry in entries:
            break
        entries.append(entry)
    return tuple(entries)


def named_entry(device: str) -> str:
    """Entry of ``cuda:N`` among the visible ones; the number itself where there are fewer, which CUDA will refuse."""
    index = int(device.partition(":")[2])
    entries = visible_entries(index + 1)
    return entries[index] if index < len(entries) else str(index)


def gpu_count() -> int:
    """NVIDIA GPUs of this machine or container; 0 where none can be found."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except Exception:  # no library, no driver: the device files tell too
        return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in _DEV.glob("nvidia*"))


def require_gpu_each(gpus: Gpus | None, device: str, workers: int) -> None:
    """Refuse more workers than GPUs: two would time on one.

    Raises
    ------
    UserError
        Naming the number that is possible.
    """
    if gpus is None or workers <= max(len(gpus.entries), 1):
        return
    if device not in ("auto", "cuda") and not gpus.simulated:
        raise UserError(
            f"--kv-device={device} names one GPU, and -n {workers} would time {workers} cases on it at the same time; give "
            "--kv-device=cuda for a GPU a worker, or -n 1"
        )
    raise UserError(
        f"-n {workers}: there are {len(gpus.entries)} GPUs to see ({', '.join(gpus.entries)}), and two workers on one would "
        f"time each other; give -n {len(gpus.entries)}"
    )


def bind(gpus: Gpus, slot: int) -> str:
    """Let this process see the GPU of its slot alone, before CUDA looks; return its entry.

    Raises
    ------
    UserError
        If something already started CUDA in this process.
    """
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and not gpus.simulated and torch.cuda.is_initialized():
        raise UserError(
            "a conftest.py or plugin used CUDA while tests were collected, so that a worker of xdist cannot be bound to its "
            "GPU; let it wait for a fixture, or run without -n"
        )
    entry = gpus.of(slot)
    os.environ[VISIBLE] = entry
    return entry
