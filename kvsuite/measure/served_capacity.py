"""Capacity of a prepared case: the same requests at ever other rates, until the highest good one is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from kvsuite.engines.capabilities import ServesUnderLoad
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.meters.capacity import Attempt, Capacity, attempt_of, find_capacity
from kvsuite.meters.serving_times import Slo

from .measurement import Measurement


def rate_of(requests: Sequence[ServeRequest]) -> float:
    """Requests a second: arrivals after the first, by the time that they take.

    Raises
    ------
    CaseInvalid
        If all come at the same time, which is no rate.
    """
    arrivals = [one.arrival_s for one in requests]
    span = max(arrivals) - min(arrivals)
    if not span:
        raise CaseInvalid(
            "all requests come at one time, which is no rate; give --kv-arrival-rate, or arrivals of a trace"
        )
    return (len(arrivals) - 1) / span


def at_rate(requests: Sequence[ServeRequest], rate: float) -> list[ServeRequest]:
    """The same requests in the same order, with the gaps between their arrivals scaled to ``rate`` requests a second."""
    first, factor = min(one.arrival_s for one in requests), rate_of(requests) / rate
    return [replace(one, arrival_s=(one.arrival_s - first) * factor) for one in requests]


def put_capacity(
    found: Measurement,
    session: ServesUnderLoad,
    requests: Sequence[ServeRequest],
    slo: Slo,
    lowest: float,
    highest: float,
    *,
    tolerance: float = 0.05,
    most: int = 12,
    trying: Callable[[int, float], None] | None = None,
) -> Capacity:
    """Find the capacity of a prepared case in the open loop, and write it with all attempts.

    Parameters
    ----------
    found
        Takes ``capacity_req_s``; ``samples["capacity"]`` has every rate with the share that met the SLO.
    session
        Prepared for the case, and warmed up.
    requests
        With arrivals, whose pattern is kept and whose rate is changed: all attempts serve the same work.
    slo
        What a request must meet.
    lowest, highest, tolerance, most
        As for `kvsuite.meters.capacity.find_capacity`.
    trying
        Called before every attempt, with the number of attempts so far and its rate.

    Raises
    ------
    CaseInvalid
        If the requests have no rate.
    """
    rate_of(requests)
    made: list[Attempt] = []

    def attempt(rate: float) -> Attempt:
        if trying is not None:
            trying(len(made), rate)
        made.append(attempt_of(rate, session.serve_under_load(at_rate(requests, rate)).requests, slo))
        return made[-1]

    capacity = find_capacity(attempt, lowest, highest, tolerance=tolerance, most=most)
    facts = {"slo": str(slo), "above": capacity.above, "attempts": len(capacity.attempts)}
    found.put("capacity_req_s", capacity.rate, clock="delivery", reason=capacity.words, **facts)
    found.samples["capacity"] = [asdict(one) for one in capacity.attempts]
    if capacity.words is not None:
        found.warnings.append(capacity.words)
    return capacity
