"""Requests that are served together: their prompts in chunks, then a token of each in every step, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvsuite.compression.base import Policy
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.meters.clock import Clock
from kvsuite.meters.timing import RequestTimes

from .context import BatchToken, Context
from .stream import Stream


def serve_requests(
    context: Context,
    requests: Sequence[ServeRequest],
    clock: Clock | None,
    *,
    policy: Policy | None = None,
    look: Callable[[Sequence[Stream]], None] | None = None,
) -> Served:
    """Serve requests that come all at once, each a sequence of its own.

    Parameters
    ----------
    context
        With as many sequences, and room for each.
    requests
        What is wanted.
    clock
        Of the stamps, ``None`` for none.
    policy
        Acts on each.
    look
        Is shown the sequences behind the prompts, and at the end.
    """
    context.clear()
    streams = [Stream(context, index, policy) for index in range(len(requests))]
    outputs: list[list[int]] = [[] for _ in requests]
    marks = 0
    prefill_marks, token_marks = [0] * len(requests), [[0] * 0 for _ in requests]

    def mark() -> int:
        nonlocal marks
        if clock is not None:
            clock.mark()
        marks += 1
        return marks - 1

    def choose(at: Sequence[tuple[int, int]], *, prompt: bool) -> None:
        """Take the most probable token of rows that are those of requests, and let the policy act."""
        for index, row in at:
            outputs[index].append(int(np.argmax(context.logits(row))))
            streams[index].evict(prompt=prompt)
        stamp = mark()
        for index, _ in at:
            token_marks[index].append(stamp)

    if clock is not None:
        clock.start()
    prefill_steps = 0
    for step in _chunks(requests, context.settings.step_tokens):
        context.decode(step)
        prefill_steps += 1
        for row in step:
            streams[row.sequence].fed(1)
        done = [(row.sequence, place) for place, row in enumerate(step) if row.wanted]
        if done:
            stamp = mark()
            for index, _ in done:
                prefill_marks[index] = stamp
            choose(done, prompt=True)
    if look is not None:
        look(streams)
    decode_steps = largest = 0
    while waiting := [index for index, one in enumerate(requests) if len(outputs[index]) < one.new_tokens]:
        context.decode([BatchToken(outputs[index][-1], streams[index].position, index, True) for index in waiting])
        for index in waiting:
            streams[index].fed(1)
        decode_steps, largest = decode_steps + 1, max(largest, len(waiting))
        choose([(index, row) for row, index in enumerate(waiting)], prompt=False)
    if look is not None:
        look(streams)
    prompts = sum(len(one.prompt) for one in requests)
    counts = {
        "steps": prefill_steps + decode_steps,
        "prefill_steps": prefill_steps,
        "decode_steps": decode_steps,
        "largest_batch": largest,
        "computed_prefill_tokens": prompts,
        "computed_decode_tokens": sum(one.new_tokens - 1 for one in requests),
    }
    if clock is None:
        return Served([], outputs, counts)
    seconds = clock.seconds()
    times = [
        RequestTimes(
            len(one.prompt), len(one.prompt), [(seconds[stamp], 1) for stamp in token_marks[index]],
            prefill_end=seconds[prefill_marks[index]],
        )
        for index, one in enumerate(requests)
    ]  # fmt: skip
    return Served(times, outputs, counts)


def _chunks(requests: Sequence[ServeRequest], size: int) -> list[list[BatchToken]]:
    """The prompts behind each other, in steps of ``size`` tokens; logits of the last token of each are wanted."""
    rows = [
        BatchToken(int(token), position, index, position == len(one.prompt) - 1)
        for index, one in enumerate(requests)
        for position, token in enumerate(one.prompt)
    ]
    return [rows[at : at + size] for at in range(0, len(rows), size)]
