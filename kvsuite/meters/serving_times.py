"""Formulas of requests under load (docs/metrics.md): latencies, an SLO and who meets it, whether a rate drains."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.errors import UserError
from kvsuite.metrics.registry import percentile
from kvsuite.options.durations import duration

#: the percentiles that are told of every latency, by the names in which they are told
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
# a queue grows for good where more than this share of the requests that come stays
_STAYING = 0.1
# and by more than so many standard deviations of a Poisson count
_CHANCE = 1.5
# fewer requests than this say nothing about a queue
_FEWEST = 16


@dataclass(frozen=True)
class Slo:
    """What a request must meet (a service-level objective): both bounds.

    Parameters
    ----------
    ttft_s
        Most seconds from its scheduled arrival to its first token.
    tpot_s
        Most seconds a further token, mean over the request.
    """

    ttft_s: float
    tpot_s: float

    @classmethod
    def parse(cls, text: str, option: str = "--kv-slo") -> Slo:
        """Read ``TTFT:TPOT`` with units, such as ``1s:25ms``.

        Raises
        ------
        UserError
            If it is anything else, or a bound is 0.
        """
        parts = text.split(":")
        if len(parts) != 2:
            raise UserError(f"{option}={text}: give a bound for TTFT and one for TPOT, such as 1s:25ms")
        bounds = []
        for name, part in zip(("TTFT", "TPOT"), parts, strict=True):
            try:
                bounds.append(duration(part))
            except ValueError as error:
                raise UserError(f"{option}={text}: {name} {part.strip()!r} {error}, such as 1s:25ms") from None
        return cls(*bounds)

    def __str__(self) -> str:
        return f"{_short(self.ttft_s)}:{_short(self.tpot_s)}"


@dataclass(frozen=True)
class LoadTimes:
    """Times of one request under load, by the host's clock, in seconds after the start of the run.

    Parameters
    ----------
    arrival_s
        When it was due, however late it was taken up.
    admitted_s
        When it was first given blocks; until then it waited in the queue. ``None`` where nobody but a client looks on.
    token_s
        When each output token was on the host.
    """

    arrival_s: float
    admitted_s: float | None
    token_s: list[float]

    @property
    def ttft_s(self) -> float:
        """From the scheduled arrival to the first token."""
        return self.token_s[0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """From the scheduled arrival to the last token."""
        return self.token_s[-1] - self.arrival_s

    @property
    def queue_s(self) -> float | None:
        """From the scheduled arrival to the first admission; ``None`` where that is not told."""
        return None if self.admitted_s is None else self.admitted_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """``(last - first token) / (n - 1)``, preemptions and all; ``None`` for fewer than two tokens."""
        return None if len(self.token_s) < 2 else (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between tokens; the TTFT is never among them."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_s)]

    def meets(self, slo: Slo) -> bool:
        """Whether it keeps both bounds; one of a single token has no TPOT that could break one."""
        return self.ttft_s <= slo.ttft_s and (self.tpot_s is None or self.tpot_s <= slo.tpot_s)


def wall_s(requests: Sequence[LoadTimes]) -> float:
    """Seconds from the first scheduled arrival to the last token."""
    return max(one.token_s[-1] for one in requests) - min(one.arrival_s for one in requests)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 by linear interpolation between order statistics (`kvsuite.metrics.registry.percentile`).

    ``None`` where fewer than ``1 / (1 - q)`` values are there, that is below 2, 10 and 100: such a percentile is no more than
    the largest value.
    """
    return {name: percentile(values, q) for name, q in PERCENTILES.items()}


def too_few(name: str, n: int) -> str:
    """Why a percentile of ``n`` values is ``None``."""
    return f"{n} samples; a {name} takes {round(1 / (1 - PERCENTILES[name]))}"


def goodput(requests: Sequence[LoadTimes], slo: Slo) -> tuple[float, float]:
    """Requests a second that meet the SLO, and their share of all requests."""
    meeting = sum(one.meets(slo) for one in requests)
    return meeting / wall_s(requests), meeting / len(requests)


def time_mean(spans: Sequence[tuple[float, float]]) -> float | None:
    """Mean of a value over time, from ``(seconds, value)``; ``None`` where no time has passed."""
    seconds = sum(length for length, _ in spans)
    return sum(length * value for length, value in spans) / seconds if seconds else None


@dataclass(frozen=True)
class Backlog:
    """Whether requests were served as fast as they came.

    Parameters
    ----------
    drains
        ``None`` where the run is too short to tell.
    growth
        By how many the most requests in the system grew from the first half of the arrivals to the second, for every one that
        came in the second; ``None`` as above.
    words
        The same for a reader.
    """

    drains: bool | None
    growth: float | None
    words: str


def backlog(requests: Sequence[LoadTimes]) -> Backlog:
    """Tell whether the rate of arrivals drains, from how many requests are in the system when others come.

    While requests come slower than they can be served, that number levels off once the first ones are over. Where its peak in
    the second half of the arrivals lies above that of the first, by more than 0.1 for every request that comes in between and
    more than chance makes it, the rate never drains: with more requests every latency would grow without end, and percentiles
    tell how long the run was. Peaks are compared, not the two ends of a half: a trace that pauses in its middle and ends in a
    burst leaves many requests in the system at any rate.
    """
    arrivals = sorted(one.arrival_s for one in requests)
    span = arrivals[-1] - arrivals[0]
    if len(requests) < _FEWEST or not span:
        return Backlog(
            None, None, f"{len(requests)} arrivals at {_count_times(arrivals)} are too few to see a queue grow"
        )
    # of a request whose admission nobody tells, its waiting counts too
    shortest = min(one.token_s[-1] - (one.arrival_s if one.admitted_s is None else one.admitted_s) for one in requests)
    if shortest > span / 2:
        return Backlog(None, None, "the arrivals end before a request can be over: too short to see a queue grow")
    ends = sorted(one.token_s[-1] for one in requests)
    inside = [came + 1 - bisect.bisect_right(ends, at) for came, at in enumerate(arrivals)]
    middle = len(inside) // 2
    came = len(inside) - middle
    stayed = max(inside[middle:]) - max(inside[:middle])
    growth = max(stayed, 0) / came
    # of so many independent arrivals some more or less come by chance
    if stayed > max(_STAYING * came, _CHANCE * math.sqrt(came)):
        return Backlog(
            False,
            growth,
            f"this rate never drains: at its peak the second half of the arrivals found {stayed} more requests in the "
            f"system than the first, {growth:.0%} of those that came; lower it",
        )
    return Backlog(True, growth, "requests left as fast as they came")


def _count_times(arrivals: Sequence[float]) -> str:
    times = len(set(arrivals))
    return "one time" if times == 1 else f"{times} times"


def _short(seconds: float) -> str:
    """``0.025`` as ``25ms``: what `Slo.parse` reads."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:g}{unit}"
    return f"{seconds / 1e-6:g}us"
