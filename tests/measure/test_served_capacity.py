"""The capacity of a prepared case: the same requests at other rates, on a server whose TTFT and TPOT are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvsuite.engines.results import RequestServed, Served, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.measure.measurement import Measurement
from kvsuite.measure.served_capacity import at_rate, put_capacity, rate_of
from kvsuite.meters.capacity import Attempt
from kvsuite.meters.serving_times import Slo
from kvsuite.metrics.registry import MetricRegistry

SLO = Slo(1.0, 0.025)
HELD_S = 0.5


class Server:
    """One request at a time: the first token after 0.1 s, all of them after `HELD_S`."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
        self.rates.append(rate_of(requests))
        free, found = 0.0, []
        for one in requests:
            begin = max(one.arrival_s, free)
            free = begin + HELD_S
            times = [begin + 0.1 + 0.02 * index for index in range(21)]
            found.append(RequestServed(one.arrival_s, begin, times, 8, 0, 8, 0, 9.0, 0.0))
        return Served([], [], {}, requests=found)

    def serve_dense(self, requests: Sequence[ServeRequest]) -> Served:
        raise NotImplementedError


def requests(count: int = 400) -> list[ServeRequest]:
    """Gaps of 1 and 3 s in turn, from 7 s on."""
    gaps = itertools.accumulate((1.0 if index % 2 else 3.0 for index in range(1, count)), initial=7.0)
    return [ServeRequest([5], 21, at) for at in gaps]


def test_gaps_are_scaled_and_nothing_else_is() -> None:
    asked = requests(5)
    assert rate_of(asked) == pytest.approx(0.5)
    scaled = at_rate(asked, 2.0)
    assert [one.arrival_s for one in scaled] == pytest.approx([0.0, 0.25, 1.0, 1.25, 2.0])
    assert [replace(one, arrival_s=0.0) for one in scaled] == [replace(one, arrival_s=0.0) for one in asked]


def test_the_capacity_is_found_and_told() -> None:
    found, server = Measurement(MetricRegistry()), Server()
    tried: list[tuple[int, float, int]] = []

    def trying(done: int, rate: float) -> None:
        tried.append((done, rate, len(server.rates)))

    capacity = put_capacity(found, server, requests(), SLO, 0.25, 64.0, trying=trying)
    # 2 requests a second can be served; with 360 of 400 that may wait for 0.9 s a little more
    assert found.metrics["capacity_req_s"]["value"] == capacity.rate == pytest.approx(2.0, rel=0.06)
    assert found.metrics["capacity_req_s"]["slo"] == "1s:25ms"
    assert [Attempt(**row) for row in found.samples["capacity"]] == capacity.attempts
    assert server.rates == pytest.approx([one.rate for one in capacity.attempts])
    # a rate is named before it is tried
    assert tried == [(index, one.rate, index) for index, one in enumerate(capacity.attempts)]
    [warning] = found.warnings
    assert "the queue never drains" in warning


def test_no_good_rate_is_null_with_the_reason() -> None:
    found = Measurement(MetricRegistry())
    put_capacity(found, Server(), requests(), SLO, 8.0, 64.0)
    assert found.metrics["capacity_req_s"]["value"] is None
    assert found.metrics["capacity_req_s"]["reason"].startswith("no rate is good: 8 requests a second never drains")


def test_requests_at_one_time_have_no_rate() -> None:
    with pytest.raises(CaseInvalid, match=r"all requests come at one time.*--kv-arrival-rate"):
        put_capacity(Measurement(MetricRegistry()), Server(), [ServeRequest([5], 2)] * 3, SLO, 1.0, 2.0)
