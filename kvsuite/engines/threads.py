"""CPU threads: a short probe with the real model chooses, the record says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

_CLEAR = 1.1


def choose_threads(
    step: Callable[[], object], *, budget_s: float = 2.0, use: Callable[[int], None] = torch.set_num_threads
) -> int:
    """Set torch, or who is told by ``use``, to the thread count that runs ``step`` fastest and return it.

    Candidates are one thread, half and all of the usable cores: which wins depends on the machine's load at the time.
    Candidates take turns, so that a passing load does not decide; the fastest single run of each counts, and fewer threads
    are taken unless more are at least a tenth faster.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    candidates = sorted({1, max(1, cores // 2), cores})
    if len(candidates) == 1:
        use(candidates[0])
        return candidates[0]
    best = dict.fromkeys(candidates, float("inf"))
    step()
    deadline = time.perf_counter() + budget_s
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        for threads in candidates:
            use(threads)
            begin = time.perf_counter()
            step()
            best[threads] = min(best[threads], time.perf_counter() - begin)
        rounds += 1
    # more threads lose much when another process comes, so they have to win clearly
    limit = _CLEAR * min(best.values())
    chosen = min(threads for threads, seconds in best.items() if seconds <= limit)
    use(chosen)
    return chosen
