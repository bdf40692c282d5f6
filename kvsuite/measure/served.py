"""From requests served under load to the metrics of a record (docs/metrics.md#serving-under-load)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from kvsuite.engines.results import RequestServed, Served, StepServed
from kvsuite.meters.clock import CudaEventClock, PerfCounterClock
from kvsuite.meters.serving_times import (
    PERCENTILES,
    Slo,
    backlog,
    goodput,
    percentiles,
    time_mean,
    too_few,
    wall_s,
)

from .measurement import Measurement

#: clock of everything here: the host's, when it has a token
DELIVERY = "delivery"

_LATENCIES: Mapping[str, Callable[[RequestServed], Sequence[float]]] = {
    "ttft": lambda one: [one.ttft_s],
    "tpot": lambda one: [] if one.tpot_s is None else [one.tpot_s],
    "itl": lambda one: one.itl_s,
    "queue": lambda one: [] if one.queue_s is None else [one.queue_s],
}


def put_served(
    found: Measurement,
    rounds: Sequence[Served],
    slo: Slo,
    *,
    sms: Mapping[str, int] | None = None,
    sms_unknown: str = "no partition: the device's SMs are shared by everything",
) -> None:
    """Write what timed rounds under load say: throughputs, latencies, goodput, queueing, and warn where a rate never drains.

    Parameters
    ----------
    found
        Takes the metrics.
    rounds
        What was served in each timed round (`Served.requests` and `Served.steps`).
    slo
        What a request must meet.
    sms
        SMs of each lane (``decode``, ``prompt``; ``both`` where one stream does everything), ``None`` for no CUDA device or
        no partition.
    sms_unknown
        Why there are none.
    """
    for name, values in _of_rounds(rounds, slo).items():
        facts = {"slo": str(slo)} if name in ("goodput_req_s", "slo_share") else {}
        found.put(name, values, clock=DELIVERY, reason=_unseen(name, rounds), **facts)
    for latency, values_of in _LATENCIES.items():
        _put_percentiles(found, latency, [[v for one in each.requests for v in values_of(one)] for each in rounds])
    used = None if sms is None else [sm_seconds(each.steps, sms) for each in rounds]
    if any(one.queue_s is None for each in rounds for one in each.requests):
        for name in PERCENTILES:
            found.put(f"queue_{name}_s", None, reason="the engine does not tell when it takes a request up")
    found.put("sm_seconds", used, clock=DELIVERY, reason=sms_unknown)
    found.tokens |= served_tokens(rounds[0])
    never = [said for each in rounds if (said := backlog(each.requests)).drains is False]
    if never:
        found.warnings.append(max(never, key=lambda said: said.growth or 0.0).words + " (--kv-arrival-rate)")


def put_compression(found: Measurement, rounds: Sequence[Served], *, on_cuda: bool, why_not: str) -> None:
    """Write what compressing a prompt took, mean over the prompts of each round that were compressed.

    Parameters
    ----------
    found
        Takes ``compress_prompt_s``.
    rounds
        What was served in each timed round.
    on_cuda
        Whether times lie between events of a CUDA stream, not between readings of the host's clock.
    why_not
        Why no prompt was compressed, where that is so in one of the rounds.
    """
    times = [[one.compress_s for one in each.requests if one.compress_s is not None] for each in rounds]
    clock = CudaEventClock.name if on_cuda else PerfCounterClock.name
    means = [sum(own) / len(own) for own in times if own]
    values = means if len(means) == len(rounds) else None
    found.put("compress_prompt_s", values, clock=clock, prompts=sum(map(len, times)), reason=why_not)


def served_tokens(served: Served) -> dict[str, int]:
    """Tokens of one round, for the record: logical ones, and those that really went through the model."""
    requests, counts = served.requests, served.counts
    found = {
        "requests": len(requests),
        "prompt": sum(one.prompt_tokens for one in requests),
        "prefill_computed": counts.get("computed_prefill_tokens"),
        "decode_computed": counts.get("computed_decode_tokens"),
        "prefix_hits": total([one.cached_tokens for one in requests]),
        "generated": sum(len(one.token_s) for one in requests),
    }
    return {name: count for name, count in found.items() if count is not None}


def total(counts: Sequence[int | None]) -> int | None:
    """Their sum; ``None`` where one is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def preemptions(served: Served) -> int | None:
    """Of all requests of a round: added up, or as the engine counts them for all; ``None`` where it does neither."""
    own = total([one.preemptions for one in served.requests])
    return served.counts.get("preemptions") if own is None else own


def sm_seconds(steps: Sequence[StepServed], sms: Mapping[str, int]) -> float:
    """SMs that were reserved for steps, times their seconds; steps of two lanes at the same time both count."""
    return sum(sms[step.lane] * (step.end_s - step.start_s) for step in steps)


def request_rows(served: Served) -> list[dict[str, Any]]:
    """One row a request for a record's samples, in JSON types; gaps between tokens are left to percentiles."""
    return [
        {
            "arrival_s": one.arrival_s,
            "admitted_s": one.admitted_s,
            "ttft_s": one.ttft_s,
            "tpot_s": one.tpot_s,
            "end_s": one.token_s[-1],
            "output_tokens": len(one.token_s),
            "prompt_tokens": one.prompt_tokens,
            "cached_tokens": one.cached_tokens,
            "computed_prompt_tokens": one.computed_prompt_tokens,
            "preemptions": one.preemptions,
            "stored_tokens": one.stored_tokens,
            "evicted_tokens": one.evicted_tokens,
            "compress_s": one.compress_s,
        }
        for one in served.requests
    ]


def step_columns(served: Served) -> dict[str, list[Any]]:
    """Steps by column, for a record's samples: a table of many short rows."""
    return {column.name: [getattr(step, column.name) for step in served.steps] for column in fields(StepServed)}


def _of_rounds(rounds: Sequence[Served], slo: Slo) -> dict[str, list[float] | None]:
    """Metrics that each round has one of; ``None`` where a round has not."""
    rows = []
    for served in rounds:
        requests, counts, steps = served.requests, served.counts, served.steps
        wall = wall_s(requests)
        output = sum(len(one.token_s) for one in requests)
        meeting, share = goodput(requests, slo)
        computed = total([counts.get(f"computed_{part}_tokens") for part in ("prefill", "decode")])
        rows.append(
            {
                "output_tok_s": output / wall,
                "total_tok_s_computed": None if computed is None else computed / wall,
                "total_tok_s_logical": (sum(one.prompt_tokens for one in requests) + output) / wall,
                "goodput_req_s": meeting,
                "slo_share": share,
                "preemptions": preemptions(served),
                "running_mean": time_mean(_spans(steps)),
                "blocks_peak": max((step.used_blocks for step in steps), default=None),
            }
        )
    found: dict[str, list[float] | None] = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row[name]) is not None]
        found[name] = values if len(values) == len(rows) else None
    return found


def _unseen(name: str, rounds: Sequence[Served]) -> str:
    if name in ("running_mean", "blocks_peak") and not all(each.steps for each in rounds):
        return "the engine tells of no steps"
    return "no time has passed" if name == "running_mean" else "the engine does not count them"


def _spans(steps: Sequence[StepServed]) -> list[tuple[float, float]]:
    """Seconds and running requests of every step; where two lanes' steps overlap, of what the one that ends first leaves."""
    found, until = [], 0.0
    for step in sorted(steps, key=lambda step: step.end_s):
        begin = max(step.start_s, until)
        found.append((step.end_s - begin, float(step.running)))
        until = step.end_s
    return found


def _put_percentiles(found: Measurement, latency: str, rounds: Sequence[Sequence[float]]) -> None:
    """Write p50, p90 and p99: of each round where all have enough values for it, else of all rounds pooled."""
    whole = percentiles([value for values in rounds for value in values])
    apart = [percentiles(values) for values in rounds]
    count = sum(map(len, rounds))
    for name in PERCENTILES:
        own = [value for each in apart if (value := each[name]) is not None]
        each_has = len(own) == len(rounds)
        found.put(
            f"{latency}_{name}_s",
            own if each_has else whole[name],
            clock=DELIVERY,
            reason=too_few(name, count),
            pooled_n=count,
            # a number of all rounds has no spread by which it could be judged; numbers of rounds have
            **({} if each_has else {"pooled": "all rounds"}),
        )
