"""How long this process was kept from a CPU by others: what makes times those of a shared machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_TASKS = Path("/proc/self/task")
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


def watched(
    run_rounds: Callable[[Callable[[], None], int], None], put: Callable[..., None]
) -> Callable[[Callable[[], None], int], None]:
    """Let ``run_rounds`` write ``host_wait_share`` too: the share of its wall time that the most delayed thread waited."""

    def run(round_: Callable[[], None], rounds: int) -> None:
        before, stolen, begin = waited_seconds(), stolen_seconds(), time.perf_counter()
        run_rounds(round_, rounds)
        wall, after = time.perf_counter() - begin, waited_seconds()
        delays = [seconds - before[thread] for thread, seconds in after.items() if thread in before]
        share = min((max(delays) + stolen_seconds() - stolen) / wall, 1.0) if delays and wall > 0 else None
        put("host_wait_share", share, reason=NO_ACCOUNT)

    return run
