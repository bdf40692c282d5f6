"""Which differences of a run's times are no news: they lie inside what its rounds vary by anyway."""

from __future__ import annotations

import math

from .aggregate import Row, ci_half_width, entry, value
from .machines import machine_of

#: stands before a difference that may be chance
MARK = "≈"
MEANING = f"{MARK}: inside the noise of the rounds (95 % intervals), or of a single round: no difference is known"
#: times whose 95 % interval reaches further to either side, as a share of the mean, are in no order with others
MOST_UNCERTAIN = 0.10


def is_timed(row: Row, metric: str) -> bool:
    """Whether the number is a time or made of times, so that a second run would give another one."""
    return entry(row, metric).get("class") == "timed"


def is_uncertain(row: Row, metric: str) -> bool:
    """Whether a timed number is too uncertain to say which of several is the best: too few rounds, or too scattered ones."""
    if not is_timed(row, metric) or value(row, metric) is None:
        return False
    half, mean = ci_half_width(row, metric), entry(row, metric).get("mean")
    return half is None or not mean or half > MOST_UNCERTAIN * abs(mean)


def inside_noise(row: Row, other: Row, metric: str) -> bool:
    """Whether two cases differ in a timed number by no more than their 95 % intervals together, or have none.

    A difference of independent numbers is as uncertain as the root of the sum of their squared intervals; of times of two
    machines none is known.
    """
    mine, theirs = value(row, metric), value(other, metric)
    if mine is None or theirs is None or not is_timed(row, metric):
        return False
    if machine_of(row) != machine_of(other):
        return True
    halves = ci_half_width(row, metric), ci_half_width(other, metric)
    return None in halves or abs(mine - theirs) <= math.hypot(*(half or 0.0 for half in halves))
