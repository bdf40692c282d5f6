"""Requests that come at their times, or one as another is over: a sequence of llama.cpp each, as long as one is free."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvsuite.engines.capabilities import require_plain
from kvsuite.engines.results import RequestServed, Served, ServeRequest, StepServed
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid

from .context import BatchToken, Context
from .memory_model import cells_of
from .stream import Stream


def sequences_of(plan: ServingPlan, token_bytes: int) -> int:
    """Sequences that a plan's pool holds, each with cells for the longest request: llama.cpp shares none between them.

    Raises
    ------
    CaseInvalid
        If it holds none.
    """
    cells = cells_of(plan.max_model_len)
    if plan.pool_blocks is not None:
        option, tokens = f"--kv-pool-blocks={plan.pool_blocks}", plan.pool_blocks * BLOCK_TOKENS
    else:
        option, tokens = f"--kv-pool-bytes={plan.pool_bytes}", (plan.pool_bytes or 0) // token_bytes
    if tokens < cells:
        raise CaseInvalid(
            f"{option}: {tokens} tokens, and a sequence of llama.cpp has {cells} cells for a request of {plan.max_model_len}; "
            "give a larger pool"
        )
    return min(plan.max_num_seqs, tokens // cells)


@dataclass
class _Run:
    """One request.

    Parameters
    ----------
    asked
        What is wanted.
    arrival_s
        When it was due.
    """

    asked: ServeRequest
    arrival_s: float
    stream: Stream | None = None
    admitted_s: float = 0.0
    fed: int = 0
    output: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    @property
    def prompt_left(self) -> int:
        return len(self.asked.prompt) - self.fed

    @property
    def is_over(self) -> bool:
        return len(self.output) == self.asked.new_tokens


def serve_under_load(
    context: Context, plan: ServingPlan, requests: Sequence[ServeRequest], *, concurrency: int | None = None
) -> Served:
    """Serve requests in an open loop, by their arrivals, or in a closed one.

    A request enters between two steps and waits until a sequence is free; who came first goes first. All times count from the
    start of the loop.

    Parameters
    ----------
    context
        With the plan's sequences.
    plan
        How prompts and decoding share steps.
    requests
        In any order.
    concurrency
        Requests under way at a time in a closed loop, ``None`` for the open one.

    Raises
    ------
    CaseInvalid
        If a request is longer than the plan says, has images, or its output is forced or scored.
    ValueError
        If a closed loop is given arrivals.
    """
    require_plain(requests, "llamacpp", concurrency)
    for one in requests:
        if len(one.prompt) + one.new_tokens > plan.max_model_len:
            raise CaseInvalid(
                f"request of {len(one.prompt)} and {one.new_tokens} tokens: longer than the {plan.max_model_len} of the plan"
            )
    context.clear()
    runs = [_Run(one, one.arrival_s) for one in requests]
    due = sorted(runs, key=lambda run: run.arrival_s)
    free, waiting, running = list(range(context.settings.sequences)), list[_Run](), list[_Run]()
    steps: list[StepServed] = []
    held = context.settings.cells // BLOCK_TOKENS
    origin = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - origin

    while due or waiting or running:
        while due and (due[0].arrival_s <= now() if concurrency is None else len(waiting) + len(running) < concurrency):
            run = due.pop(0)
            if concurrency is not None:
                run.arrival_s = now()
            waiting.append(run)
        while waiting and free:
            run = waiting.pop(0)
            run.stream, run.admitted_s = Stream(context, free.pop(0)), now()
            running.append(run)
        if not running:
            time.sleep(max(due[0].arrival_s - now(), 0.0))
            continue
        start, rows = now(), _step(running, plan)
        prompts = sum(count for run, count in rows if run.prompt_left)
        _feed(context, rows, now)
        active = len(running)
        steps.append(
            StepServed(
                "both",
                start,
                now(),
                prompts,
                sum(count for _, count in rows) - prompts,
                active,
                len(waiting),
                active * held,
            )
        )
        for run in [one for one in running if one.is_over]:
            running.remove(run)
            assert run.stream is not None
            context.remove(run.stream.sequence, 0, -1)
            free.append(run.stream.sequence)
    fed = sum(len(one.prompt) for one in requests), sum(one.new_tokens - 1 for one in requests)
    counts = {
        "steps": len(steps),
        "computed_prefill_tokens": fed[0],
        "computed_decode_tokens": fed[1],
        "preemptions": 0,
        "largest_batch": max(step.decode_tokens for step in steps),
    }
    return Served(
        [], [run.output for run in runs], counts, requests=[_served(run) for run in runs], steps=steps
    )  # fmt: skip


def _step(running: Sequence[_Run], plan: ServingPlan) -> list[tuple[_Run, int]]:
    """What the next step feeds: of each request so many tokens of its prompt, or its last output."""
    feeding = [run for run in running if run.prompt_left]
    decoding = [] if feeding and plan.prompts_first else [(run, 1) for run in running if not run.prompt_left]
    left = plan.step_tokens - len(decoding)
    rows = []
    for run in feeding:
        if count := min(run.prompt_left, left):
            rows.append((run, count))
            left -= count
    return [*decoding, *rows]


def _feed(context: Context, parts: Sequence[tuple[_Run, int]], now: Callable[[], float]) -> None:
    """One step, and the tokens that it gives."""
    rows: list[BatchToken] = []
    ends: list[tuple[_Run, int]] = []
    for run, count in parts:
        assert run.stream is not None
        is_prompt = run.prompt_left > 0
        tokens = run.asked.prompt[run.fed : run.fed + count] if is_prompt else run.output[-1:]
        gives = not is_prompt or count == run.prompt_left
        at = run.stream.position
        rows += [
            BatchToken(int(token), at + place, run.stream.sequence, gives and place == len(tokens) - 1)
            for place, token in enumerate(tokens)
        ]
        run.stream.fed(len(tokens))
        run.fed += count if is_prompt else 0
        if gives:
            ends.append((run, len(rows) - 1))
    context.decode(rows)
    for run, row in ends:
        run.output.append(int(np.argmax(context.logits(row))))
    for run, _ in ends:
        run.token_s.append(now())


def _served(run: _Run) -> RequestServed:
    assert run.stream is not None
    return RequestServed(
        arrival_s=run.arrival_s,
        admitted_s=run.admitted_s,
        token_s=run.token_s,
        prompt_tokens=len(run.asked.prompt),
        cached_tokens=0,
        computed_prompt_tokens=len(run.asked.prompt),
        preemptions=0,
        stored_tokens=float(run.stream.stored),
        evicted_tokens=0.0,
    )
