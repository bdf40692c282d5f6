"""When two times differ: the spread of rounds, the luck of processes, and how many questions are asked at once.

A change of a time counts if two things hold.

1. **Rounds**: a two-sided Mann-Whitney U test of the rounds of both sides gives p < 0.01.
2. **Processes**: the change of the median lies outside the noise band of both sides. Rounds of one process share its memory
   layout, clocks and neighbours, so their p-value alone would name two runs of the same code different; the band is what two
   sides of the same code differ by. From four processes on it is measured: the spread of their medians within the sides,
   Student's t. With fewer it cannot be: `PROCESS_NOISE` is assumed, or the spread of the rounds where that is larger. A side
   of one process has nothing beside it that would show what the machine was like, so there the band is never less than the
   spread of the machine's speed and the share of its speed that a side lacked, and a side counts as the faster for it that
   it may have been. Speed is what a fixed loop measures right before and after the rounds (`host_probe_s`): another tenant
   on the same core, a lower clock rate. It is lacking where that loop took longer than on the other side, and while a
   process waits for a CPU (`host_wait_share`).

The band is one-sided at ``FALSE_ALARMS / family``, ``family`` being the number of timed comparisons that a rule gates
(Bonferroni): all gated times of a comparison together name a regression of unchanged code in at most one of a hundred
comparisons. Everything is done on logarithms, so that twice as slow is as far as twice as fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Literal

import msgspec

from .records import MetricEntry

#: share of comparisons of unchanged code that name a timed regression, at most
FALSE_ALARMS = 0.01
#: p of the rounds; 5 against 5 separated rounds reach 0.0079
ROUNDS_P = 0.01
MIN_ROUNDS = 5
#: assumed standard deviation of one process's median, where it cannot be measured (docs/comparison.md has measured ones)
PROCESS_NOISE = 0.05
#: coefficient of variation of rounds, and share of speed lacking, above which "no difference found" is not said
MAX_CV = 0.10
_MOST_LACKING = 0.999
# pairs of rounds up to which the exact distribution is worth its time
_EXACT = 2500
# standard error of a median over that of a mean, for normal samples
_MEDIAN_SE = math.sqrt(math.pi / 2)


class TimedChange(msgspec.Struct, frozen=True, gc=False):
    """What is known of the change of a time.

    Parameters
    ----------
    change
        Relative change of the median.
    low, high
        Relative changes that sides of the same code show: the noise band around 0.
    real
        Whether the change counts.
    measured
        Whether the noise of processes was measured; else it was assumed.
    alone
        Whether a side is one process, so that its machine's speed counts.
    cv
        Largest coefficient of variation of the rounds of a process.
    """

    change: float
    low: float
    high: float
    real: bool
    measured: bool
    alone: bool
    cv: float


class Machine(msgspec.Struct, frozen=True, gc=False):
    """What the machine was like around the rounds of two sides.

    Parameters
    ----------
    lacks
        Share of its speed that base and now lacked, in [0, 1]: by waiting for a CPU, by a CPU slower than the other side's.
    varies
        Coefficient of variation of its speed, the larger of both sides.
    noise
        Standard deviation of a process's median that has to be assumed for it.
    """

    lacks: tuple[float, float]
    varies: float
    noise: float

    @classmethod
    def of(cls, lacks: tuple[float, float], varies: float) -> Machine:
        """What is seen of others is also the size of what cannot be seen of them: they take caches and memory as well."""
        return cls(lacks, varies, max(*lacks, varies))


_QUIET = Machine.of((0.0, 0.0), 0.0)


def timed_change(
    base: Sequence[MetricEntry], now: Sequence[MetricEntry], family: int, machine: Machine = _QUIET
) -> TimedChange | None:
    """Judge the rounds of two sides, one entry a process.

    Parameters
    ----------
    base, now
        Entries with positive values.
    family
        Gated timed comparisons that are made together, at least 1.
    machine
        What it was like while the sides were measured.

    Returns
    -------
    TimedChange or None
        ``None`` if a process has fewer than `MIN_ROUNDS` rounds or a value that is no positive time.
    """
    first, second = _logarithms(base), _logarithms(now)
    if first is None or second is None:
        return None
    (before, cv, rounds), (after, own, more) = first, second
    processes = len(before) + len(after)
    # squared standard error of the logarithm of a median
    rounds = _MEDIAN_SE**2 * (rounds + more) / processes
    cv = max(cv, own)
    difference = sum(after) / len(after) - sum(before) / len(before)
    share = 1 / len(before) + 1 / len(after)
    # what three processes differ by says next to nothing about processes
    measured = processes > 3
    alone = min(len(before), len(after)) == 1
    normal = _quantile(max(family, 1), None)
    if measured:
        freedom = processes - 2
        variance = math.fsum((value - fmean(side)) ** 2 for side in (before, after) for value in side) / freedom
        # medians of few rounds cannot agree better than their rounds allow, they can only seem to
        half = _quantile(max(family, 1), freedom) * math.sqrt(share * max(variance, rounds))
        if alone:
            half = max(half, normal * math.sqrt(share * (machine.noise**2 + rounds)))
    else:
        assumed = max(PROCESS_NOISE, cv, machine.noise)
        half = normal * math.sqrt(share * (assumed**2 + rounds))
    low, high = -half, half
    if alone:
        # with all of its speed a side may have been faster: its times shorter, its rates higher
        below, above = machine.lacks if base[0].better == "lower" else machine.lacks[::-1]
        low += math.log1p(-min(below, _MOST_LACKING))
        high -= math.log1p(-min(above, _MOST_LACKING))
    return TimedChange(
        change=math.expm1(difference),
        low=math.expm1(low),
        high=math.expm1(min(high, 700.0)),
        # the test of the rounds is the dearer one: it is asked only where it can decide
        real=not low <= difference <= high and _rounds_p(base, now) < ROUNDS_P,
        measured=measured,
        alone=alone,
        cv=cv,
    )


def _logarithms(side: Sequence[MetricEntry]) -> tuple[list[float], float, float] | None:
    """Logarithms of the processes' medians, the largest variation of their rounds, and the sum of its squares over rounds."""
    logarithms, largest, squares = [], 0.0, 0.0
    for entry in side:
        if entry.n is None or entry.n < MIN_ROUNDS or entry.value is None or entry.value <= 0:
            return None
        logarithms.append(math.log(entry.value))
        if own := entry.cv:
            largest = max(largest, own)
            squares += own * own / entry.n
    return logarithms, largest, squares


@functools.cache
def _quantile(family: int, freedom: int | None) -> float:
    if freedom is None:
        return NormalDist().inv_cdf(1 - FALSE_ALARMS / family)
    # what scipy.stats.t asks, without a second of imports
    from scipy.special import stdtrit

    return float(-stdtrit(freedom, FALSE_ALARMS / family))


def _rounds_p(base: Sequence[MetricEntry], now: Sequence[MetricEntry]) -> float:
    from scipy.stats import mannwhitneyu

    before, after = ([value for entry in side for value in entry.rounds()] for side in (base, now))
    if not before or not after:
        return 1.0
    # the normal approximation, which ties would otherwise choose, calls 5 separated against 5 rounds p = 0.012
    method: Literal["exact", "asymptotic"] = "exact" if len(before) * len(after) <= _EXACT else "asymptotic"
    return float(mannwhitneyu(before, after, alternative="two-sided", method=method).pvalue)
