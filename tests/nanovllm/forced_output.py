"""Texts through a runtime whose last tokens are forced, and the logits behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from decoders import greedy
from hand_aside import HandAside
from serving import LogitsByRequest
from torch import Tensor

from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime


def forced_logits(
    runtime: Runtime,
    texts: Sequence[Sequence[int]],
    output: int,
    *,
    aside: HandAside | None = None,
    preempt_at: Sequence[int] = (),
    change: Callable[[int, Request], None] = lambda index, request: None,
) -> list[Tensor]:
    """Logits ``[output, vocab]`` of every text; the runtime is closed behind them.

    Parameters
    ----------
    runtime
        Has nothing to do.
    texts
        All are added before the first step.
    output
        Tokens at the end of each that are forced.
    aside
        Compresses in the place of the runtime's own stream.
    preempt_at
        Steps behind which a request has to leave.
    change
        Called with the index of a text and its request before that is added.
    """
    try:
        if aside is not None:
            runtime.compression._aside = aside
        seen = LogitsByRequest(runtime)
        requests = []
        for index, text in enumerate(texts):
            request = greedy(text[:-output], output, forced=text[-output:])
            change(index, request)
            requests.append(runtime.add(request))
        while runtime.unfinished:
            runtime.step()
            if runtime.counters.steps in preempt_at:
                runtime.scheduler.preempt_for(greedy([1], 1))
        assert [request.reason for request in requests] == ["length"] * len(requests)
        found = [seen.of(request)[-output:] for request in requests]
    finally:
        runtime.close()
    if aside is not None:
        aside.do_all()
    return found
