"""Capacity of a case: which requests are sent at other rates, and between which rates it is sought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.capabilities import ServesUnderLoad
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.served_capacity import put_capacity
from kvsuite.meters.serving_times import Slo, wall_s
from kvsuite.workloads.arrivals import CLOSED, poisson_arrivals

from .options import AUTO

#: rates of the bisection at most
MOST_RATES = 12
_TOLERANCE = 0.05
#: where a server's closed loop gives R requests a second, its capacity is sought from R / 8 to 2 R
_BELOW, _ABOVE = 8.0, 2.0


def rates_of(asked: Any, closed_rate: float) -> tuple[float, float]:
    """The lowest and highest rate of ``--kv-capacity``, requests a second; ``auto`` lies around the closed loop's."""
    if asked == AUTO:
        return closed_rate / _BELOW, closed_rate * _ABOVE
    lowest, highest = asked
    return float(lowest), float(highest)


def capacity_passes(case: Case) -> int:
    """Passes over a case's requests that its capacity takes at most; 0 where none is sought."""
    asked = case.params.get("capacity")
    if asked is None:
        return 0
    lowest, highest = rates_of(asked, 1.0)
    halvings = math.ceil(math.log2(max(1.0, math.log(highest / lowest) / math.log(1 + _TOLERANCE))))
    closed_loop = asked == AUTO and case.workload["arrivals"] != CLOSED
    return int(closed_loop) + min(MOST_RATES, 2 + halvings)


def put_case_capacity(
    session: ServesUnderLoad, run: CaseRun, requests: Sequence[ServeRequest], served: Sequence[Served], *, seed: int
) -> None:
    """Find the capacity of a prepared case in the open loop, where ``--kv-capacity`` asks for it.

    Parameters
    ----------
    session
        Prepared and warmed up.
    run
        Of the case.
    requests
        Of a timed round. Gaps between their arrivals are scaled; requests that came together get gaps of a Poisson process.
    served
        What the timed rounds gave: the rate of ``auto`` where that was a closed loop.
    seed
        Of the gaps.
    """
    asked = run.case.params.get("capacity")
    if asked is None:
        return
    if len(requests) < 2:
        run.found.put("capacity_req_s", None, reason="a single request has no rate of arrivals; ask for larger batches")
        return
    run.phase("capacity")
    spread = list(requests)
    is_closed = run.case.workload["arrivals"] == CLOSED
    if is_closed:
        gaps = poisson_arrivals(len(requests), rate=1.0, seed=seed)
        spread = [replace(one, arrival_s=at) for one, at in zip(requests, gaps, strict=True)]
    closed_rate = 0.0
    if asked == AUTO:
        if not is_closed:
            run.progress("capacity", 0, MOST_RATES, ": all requests at once")
            served = [session.serve_under_load([replace(one, arrival_s=0.0) for one in requests])]
        closed_rate = sum(len(one.requests) / wall_s(one.requests) for one in served) / len(served)
    lowest, highest = rates_of(asked, closed_rate)

    def trying(done: int, rate: float) -> None:
        run.progress("capacity", done, MOST_RATES, f": trying {rate:.4g} requests a second")

    slo = Slo.parse(str(run.case.params["slo"]))
    try:
        put_capacity(
            run.found, session, spread, slo, lowest, highest, tolerance=_TOLERANCE, most=MOST_RATES, trying=trying
        )
    except CaseInvalid as error:
        # what the rounds found stays
        run.found.put("capacity_req_s", None, reason=str(error))
