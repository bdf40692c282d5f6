"""How long others kept this process from a CPU, and how fast the CPU was: what makes times those of a shared machine."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_TASKS = Path("/proc/self/task")
_PROBES, _TURNS = 10, 100_000
# this process itself is one that runs, and a desktop is never quite still
_IDLE_LOAD, _BUSY_SHARE = 1.0, 0.25
_STEADY_SPREAD = 0.5
NO_ACCOUNT = "the kernel keeps no account of waiting (/proc/self/task/*/schedstat, Linux)"


def waited_seconds() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and waited for a CPU, by thread id; empty off Linux."""
    found: dict[str, float] = {}
    try:
        for task in _TASKS.iterdir():
            # on the CPU, waiting for one, slices; nanoseconds
            found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # a thread may end while it is read
        pass
    return found


def stolen_seconds() -> float:
    """Seconds that the hypervisor gave to other machines, mean over the CPUs; 0 where that is not counted."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)
    except (OSError, IndexError, ValueError, AttributeError):
        return 0.0


def probe_seconds() -> list[float]:
    """Seconds of a fixed loop of the interpreter, ten times, about 50 ms in all: how fast and how steady this core is now.

    Another tenant on the core's other hardware thread, or a lower clock rate, makes every time longer without any waiting.
    """
    stamps = [time.perf_counter()]
    for _ in range(_PROBES):
        total = 0
        for turn in range(_TURNS):
            total += turn & 7
        stamps.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(stamps)]


def busy_words(load: float | None, cores: int, probes: Sequence[float]) -> str | None:
    """Why times measured now would be those of a busy machine, ``None`` where nothing says so.

    Parameters
    ----------
    load
        Processes that ran or wanted to, mean of the last minute; ``None`` where the system does not count them.
    cores
        That this process may use.
    probes
        `probe_seconds`.
    """
    found = []
    if load is not None and load > _IDLE_LOAD + _BUSY_SHARE * cores:
        found.append(f"load {load:.1f} on {cores} cores")
    spread = max(probes) / min(probes) - 1
    if spread > _STEADY_SPREAD:
        found.append(f"a fixed loop of the interpreter takes up to {spread:.0%} longer from one time to the next")
    return ", ".join(found) or None


def busy_now() -> str | None:
    """`busy_words` of this machine as it is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return busy_words(load, cores, probe_seconds())


def watched(
    run_rounds: Callable[[Callable[[], None], int], None], put: Callable[..., None]
) -> Callable[[Callable[[], None], int], None]:
    """Let ``run_rounds`` write what the machine was like meanwhile.

    ``host_wait_share`` is the share of its wall time that the most delayed thread waited, ``host_probe_s`` holds the
    `probe_seconds` of right before and right after it.
    """

    def run(round_: Callable[[], None], rounds: int) -> None:
        speed = probe_seconds()
        before, stolen, begin = waited_seconds(), stolen_seconds(), time.perf_counter()
        run_rounds(round_, rounds)
        wall, after = time.perf_counter() - begin, waited_seconds()
        delays = [seconds - before[thread] for thread, seconds in after.items() if thread in before]
        share = min((max(delays) + stolen_seconds() - stolen) / wall, 1.0) if delays and wall > 0 else None
        put("host_wait_share", share, reason=NO_ACCOUNT)
        # probes of two interpreters are two probes
        interpreter = f"{platform.python_implementation()} {platform.python_version()}"
        put("host_probe_s", speed + probe_seconds(), protocol=interpreter)

    return run
