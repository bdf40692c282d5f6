"""Requests that come at their times, or one as another is over, on a runtime of the `nano` engine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvsuite.engines.capabilities import require_loop
from kvsuite.engines.results import Lane, OutputScores, RequestServed, Served, ServeRequest, StepServed
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.stage_times import StageTimes

from .output_scores import OutputScorer
from .serving import exactly


def serve_under_load(runtime: Runtime, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served:
    """Serve requests in an open loop, by their arrivals, or in a closed one.

    In the open loop a request enters between two steps, as soon as its time has come; with nothing to do the loop sleeps
    until the next arrival. All times count from the start of the loop, and a request's own from its scheduled arrival: what
    it had to wait because a step was under way, or because the loop was late, is part of its time to the first token.

    Parameters
    ----------
    runtime
        Has nothing else to do.
    requests
        In any order.
    concurrency
        Requests under way at a time in a closed loop, ``None`` for the open one.

    Raises
    ------
    CaseInvalid
        If a request can never be served: it is longer than the limits or the pool, or its images are not what its prompt
        says. If a key or a value has no number in the case's cache format.
    RuntimeError
        If one is not served to its end, with the reason.
    ValueError
        If a closed loop is given arrivals.
    """
    require_loop(requests, concurrency)
    own = [Request(list(one.prompt), exactly(one.new_tokens), forced=one.forced, images=one.images) for one in requests]
    scored = [(request, asked) for request, asked in zip(own, requests, strict=True) if asked.scored]
    scorer = OutputScorer(runtime, scored) if scored else None
    before, waited = runtime.counters.to_dict(), runtime.waited_s
    runtime.on_logits = scorer
    runtime.compression.measured = times = StageTimes(runtime.device)
    runtime.restart_controller()
    try:
        arrivals, steps, origin = _loop(runtime, requests, own, concurrency)
    finally:
        runtime.on_logits = runtime.on_lane_step = runtime.compression.measured = None
        for request in own:
            runtime.cancel(request)
    runtime.refuse_vectors()
    for request in own:
        if request.status is not Status.FINISHED:
            raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
    scores = {} if scorer is None else scorer.scores()
    counts = {name: count - before[name] for name, count in runtime.counters.to_dict().items()}
    compressed = times.seconds()
    layers = [len(group.layers) for group in runtime.groups]
    return Served(
        [],
        [request.output for request in own],
        counts,
        requests=[
            _served(request, arrival, origin, layers, scores.get(request), compressed.get(request))
            for request, arrival in zip(own, arrivals, strict=True)
        ],
        steps=steps,
        decisions=[] if runtime.controller is None else runtime.controller.log,
        waited_s=runtime.waited_s - waited,
    )


def _loop(
    runtime: Runtime, requests: Sequence[ServeRequest], own: Sequence[Request], concurrency: int | None
) -> tuple[list[float], list[StepServed], float]:
    """Serve; return when each request was due, every step, and the clock's zero."""
    order = sorted(range(len(own)), key=lambda index: requests[index].arrival_s)
    arrivals = [one.arrival_s for one in requests]
    # tuples while it runs: what is kept of a step must not slow the next one
    taken: list[tuple[Lane, float, float, int, int, int, int, int]] = []
    counters, scheduler, pools = runtime.counters, runtime.scheduler, [table.pool for table in runtime.tables]
    clock = time.perf_counter
    entered, over, held, origin = 0, 0, 0, clock()

    def note(lane: Lane, start: float, end: float, prompts: int, decoded: int) -> None:
        nonlocal over, held
        # what is over by now held its blocks until now
        running, waiting = len(scheduler.running) - over, len(scheduler.waiting)
        over = entered - runtime.unfinished
        running += over
        before, held = held, max(pool.used for pool in pools)
        taken.append((lane, start - origin, end - origin, prompts, decoded, running, waiting, max(before, held)))

    # with two lanes a call of `step` may be part of several steps, which tell of themselves
    lanes_tell = runtime.lanes == 2
    if lanes_tell:
        runtime.on_lane_step = lambda step: note(
            step.lane, step.start_s, step.end_s, step.prompt_tokens, step.decode_tokens
        )
    while entered < len(own) or runtime.unfinished:
        now = clock() - origin
        while entered < len(own):
            index = order[entered]
            if concurrency is None and arrivals[index] > now:
                break
            if concurrency is not None:
                if runtime.unfinished >= concurrency:
                    break
                arrivals[index] = now
            request = runtime.add(own[index])
            if request.status is Status.FAILED:
                raise CaseInvalid(f"request of {request.prompt_length} tokens: {request.reason}")
            entered += 1
        if not runtime.unfinished:
            if entered < len(own):
                time.sleep(max(arrivals[order[entered]] - (clock() - origin), 0.0))
            continue
        fed = counters.computed_prefill_tokens, counters.computed_decode_tokens
        start = clock()
        runtime.step()
        end = clock()
        prompts, decoded = counters.computed_prefill_tokens - fed[0], counters.computed_decode_tokens - fed[1]
        if not lanes_tell and (prompts or decoded):
            note("both", start, end, prompts, decoded)
    return arrivals, [StepServed(*step) for step in taken], origin


def _served(
    request: Request,
    arrival: float,
    origin: float,
    layers: Sequence[int],
    scores: OutputScores | None,
    compress_s: float | None,
) -> RequestServed:
    assert request.admitted_at is not None
    # the last token is chosen and never fed
    length = request.prompt_length + request.output_length - 1
    stored = sum(count * tokens for count, tokens in zip(layers, request.stored, strict=True)) / sum(layers)
    return RequestServed(
        arrival_s=arrival,
        admitted_s=request.admitted_at - origin,
        token_s=[at - origin for at in request.times],
        prompt_tokens=request.prompt_length,
        cached_tokens=request.prefix_hits,
        computed_prompt_tokens=request.fed - (request.output_length - 1),
        preemptions=request.preemptions,
        stored_tokens=stored,
        evicted_tokens=length - stored,
        scores=scores,
        compress_s=compress_s,
    )
