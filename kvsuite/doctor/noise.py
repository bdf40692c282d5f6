"""The noise of a machine: the same work again and again, how much its times differ, and what can be told in spite of it."""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any

ROUNDS = 5  # of a case, by default
GATE = 0.05  # the tightest change of a time that a gate asks about by default
_MOST_ROUNDS = 200
_ROUND_S = 0.04
_THREADS_SHARE = 0.3
# larger than any cache of a CPU, so that a step waits for memory as a decode step does
_CPU_ROWS = 4096
_GPU_ROWS = 16384


@dataclass(frozen=True)
class Noise:
    """What a self-test found.

    Parameters
    ----------
    device
        ``"cpu"`` or ``"cuda:N"``.
    work
        What was repeated.
    threads
        Of the CPU that the test ran with: the fastest of those tried; ``None`` on a GPU.
    step_s_by_threads
        Median seconds of a step by number of threads.
    rounds, round_s
        How many there were and their median in seconds.
    cv
        Standard deviation of the rounds over their mean.
    drift
        Change over the whole test by the Theil-Sen line through the rounds, as a share of the median.
    stolen
        Share of the machine's processor time that a hypervisor took meanwhile; ``None`` where the kernel does not say.
    """

    device: str
    work: str
    threads: int | None
    step_s_by_threads: dict[int, float]
    rounds: int
    round_s: float
    cv: float
    drift: float
    stolen: float | None

    def detectable(self, rounds: int = ROUNDS) -> float:
        """Smallest difference of two cases, as a share, that their intervals tell apart.

        ``t(0.975, 2n - 2) * sqrt(2 / n) * cv``: half the 95 % interval of a difference of two means of ``rounds`` each.
        The drift is added, since cases run one after the other.
        """
        from scipy.special import stdtrit

        return float(stdtrit(2 * rounds - 2, 0.975)) * math.sqrt(2 / rounds) * self.cv + abs(self.drift)

    def rounds_for(self, difference: float = GATE) -> int | None:
        """Rounds from which on ``difference`` can be told, ``None`` where no sensible number is enough."""
        counts = range(2, _MOST_ROUNDS + 1)
        place = bisect_left(counts, True, key=lambda rounds: self.detectable(rounds) <= difference)
        return counts[place] if place < len(counts) else None

    @property
    def verdict(self) -> str:
        """What differences of times can be told here."""
        limit = f"differences of times below {self.detectable():.1%} cannot be told with {ROUNDS} rounds"
        enough = self.rounds_for()
        if enough is not None and enough <= ROUNDS:
            return f"quiet: {limit}"
        if enough is not None:
            return f"noisy: {limit}; {enough} rounds would tell {GATE:.0%} (--kv-rounds={enough})"
        mend = "close other programs, or compare in turns (ab)"
        return f"too noisy for times: {limit}, and no number of rounds would tell {GATE:.0%}; {mend}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, the verdict with them."""
        counted = {str(threads): seconds for threads, seconds in self.step_s_by_threads.items()}
        return asdict(self) | {
            "step_s_by_threads": counted, "detectable": self.detectable(), "rounds_for_gate": self.rounds_for(),
            "gate": GATE, "verdict": self.verdict,
        }  # fmt: skip


def self_test(device: str, seconds: float = 5.0, *, rows: int | None = None) -> Noise:
    """Repeat a product of a matrix and a vector, which reads the matrix as a decode step reads its weights.

    Parameters
    ----------
    device
        ``"cpu"`` or ``"cuda:N"``.
    seconds
        How long, warm-up left out; on a CPU about a third of it goes into finding the number of threads.
    rows
        Of the square matrix (float32 on a CPU, bfloat16 on a GPU); by default 64 and 512 MiB.
    """
    import torch

    on_cpu = device == "cpu"
    size = rows or (_CPU_ROWS if on_cpu else _GPU_ROWS)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    weights = torch.ones((size, size), dtype=dtype, device=device)
    vector = torch.ones(size, dtype=dtype, device=device)
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            return _measure(device, lambda: torch.mv(weights, vector), weights, seconds)
    finally:
        torch.set_num_threads(before)


def _measure(device: str, step: Callable[[], Any], weights: Any, seconds: float) -> Noise:
    import torch

    from kvsuite.meters.clock import clock_for

    clock = clock_for(torch.device(device))

    def timed(steps: int) -> float:
        clock.start()
        for _ in range(steps):
            step()
        clock.mark()
        return clock.seconds()[-1]

    timed(3)
    by_threads: dict[int, float] = {}
    if device == "cpu":
        by_threads = _by_threads(timed, _THREADS_SHARE * seconds)
        torch.set_num_threads(min(by_threads, key=by_threads.__getitem__))
        seconds *= 1 - _THREADS_SHARE
    timed(3)  # the first products with other threads are slow ones
    steps = max(1, round(_ROUND_S / max(min(by_threads.values(), default=timed(3) / 3), 1e-9)))
    ticks = _processor_ticks()
    rounds: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < deadline:
        rounds.append(timed(steps))
    size = weights.numel() * weights.element_size() >> 20
    products = "product" if steps == 1 else "products"
    return Noise(
        device=device,
        work=f"rounds of {steps} {products} of a {size} MiB matrix and a vector",
        threads=torch.get_num_threads() if device == "cpu" else None,
        step_s_by_threads=by_threads,
        rounds=len(rounds),
        round_s=median(rounds),
        cv=stdev(rounds) / fmean(rounds),
        drift=drift(rounds),
        stolen=_stolen(ticks, _processor_ticks()),
    )


def drift(rounds: list[float]) -> float:
    """Change from the first to the last round by the Theil-Sen line, as a share of the median."""
    from scipy.stats import theilslopes

    slope = float(theilslopes(rounds).slope)
    return slope * (len(rounds) - 1) / median(rounds)


def _by_threads(timed: Callable[[int], float], seconds: float) -> dict[int, float]:
    """Median seconds of a step with one thread, half and all of the cores, which take turns."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[int, list[float]] = {threads: [] for threads in sorted({1, max(1, cores // 2), cores})}
    deadline = time.perf_counter() + seconds
    while len(found[1]) < 3 or time.perf_counter() < deadline:
        for threads, times in found.items():
            torch.set_num_threads(threads)
            times.append(timed(1))
    return {threads: median(times) for threads, times in found.items()}


def _processor_ticks() -> list[int] | None:
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return [int(field) for field in file.readline().split()[1:]]
    except OSError:
        return None


def _stolen(before: list[int] | None, after: list[int] | None) -> float | None:
    """Share of the time between two readings of /proc/stat's first line (proc(5)): the eighth field is stolen time."""
    if before is None or after is None or len(before) < 8:
        return None
    spent = [end - begin for begin, end in zip(before[:8], after[:8], strict=True)]
    return spent[7] / sum(spent) if sum(spent) > 0 else 0.0
