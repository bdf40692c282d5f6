"""Capacity: the highest rate of arrivals at which nearly all requests meet an SLO, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .serving_times import LoadTimes, Slo, backlog, goodput

#: share of requests that must meet the SLO at a rate that counts
MEETING = 0.9


@dataclass(frozen=True)
class Attempt:
    """What one rate gave.

    Parameters
    ----------
    rate
        Requests a second.
    share
        Share of them that met the SLO.
    drains
        Whether they were served as fast as they came; ``None`` where that could not be told.
    """

    rate: float
    share: float
    drains: bool | None = None

    @property
    def good(self) -> bool:
        """Whether the rate can be sustained: enough requests meet the SLO, and the queue does not grow for good."""
        return self.share >= MEETING and self.drains is not False


def attempt_of(rate: float, requests: Sequence[LoadTimes], slo: Slo) -> Attempt:
    """What serving ``requests``, which came at ``rate``, says of it."""
    return Attempt(rate, goodput(requests, slo)[1], backlog(requests).drains)


@dataclass(frozen=True)
class Capacity:
    """Where a server's capacity lies.

    Parameters
    ----------
    rate
        The highest rate that was found good, requests a second; ``None`` where none was.
    above
        The lowest rate that was found bad; ``None`` where none was, and the capacity is at least `rate`.
    attempts
        All rates in the order in which they were tried.
    """

    rate: float | None
    above: float | None
    attempts: list[Attempt]

    @property
    def words(self) -> str | None:
        """What a reader must know of the number: it is only a bound, or rates above it never drain."""
        if self.rate is None:
            lowest = min(self.attempts, key=lambda one: one.rate)
            why = "never drains" if lowest.drains is False else f"lets {lowest.share:.0%} meet the SLO"
            return f"no rate is good: {lowest.rate:g} requests a second {why}; give a lower rate or a looser SLO"
        if self.above is None:
            return f"the capacity is at least {self.rate:g} requests a second, the highest rate that was tried"
        never = [one.rate for one in self.attempts if one.drains is False]
        return f"from {min(never):g} requests a second on the queue never drains" if never else None


def find_capacity(
    attempt: Callable[[float], Attempt], lowest: float, highest: float, *, tolerance: float = 0.05, most: int = 12
) -> Capacity:
    """Find the highest good rate in ``[lowest, highest]``.

    Rates are halved by ratio, so that the answer is as sharp at 0.1 requests a second as at 100. A rate below a good one is
    taken to be good: one noisy attempt moves the answer by no more than its neighbours.

    Parameters
    ----------
    attempt
        Serves requests at a rate and tells how that went. Attempts of equal requests, scaled in time, compare best.
    lowest, highest
        Rates, requests a second.
    tolerance
        Ends where the lowest bad rate is less than so much above the highest good one, relative to it.
    most
        Attempts at most.

    Raises
    ------
    ValueError
        If the range, tolerance or number is impossible.
    """
    if not 0 < lowest <= highest or tolerance <= 0 or most < 2:
        raise ValueError(f"rates [{lowest}, {highest}], tolerance {tolerance}, {most} attempts: no bisection")
    first = attempt(lowest)
    if not first.good:
        return Capacity(None, lowest, [first])
    last = attempt(highest) if highest > lowest else first
    attempts = [first, last] if highest > lowest else [first]
    if last.good:
        return Capacity(highest, None, attempts)
    good, bad = lowest, highest
    while bad / good > 1 + tolerance and len(attempts) < most:
        rate = (good * bad) ** 0.5
        attempts.append(attempt(rate))
        if attempts[-1].good:
            good = rate
        else:
            bad = rate
    return Capacity(good, bad, attempts)
