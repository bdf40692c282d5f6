"""How long the compression stage works on each prompt, where it works, without stopping a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from .request import Request
from .spans import Spans
from .stage_streams import Work


class StageTimes:
    """Times the stage's work on keys and values (`CompressionStage.measured`): choosing what stays, and moving it.

    On CUDA a piece of work lies between two events of the stream that does it, and nobody waits for them before `seconds`.

    Parameters
    ----------
    device
        Of the runtime.
    now
        Seconds, where the device is not CUDA.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._spans = Spans(device, now)
        self._found: dict[Request, tuple[int, float]] = {}

    def __call__(self, request: Request, work: Work) -> Work:
        """The same work for a request's prompt, in one of the layer groups, with marks around it."""

        def measured() -> None:
            start = self._spans.mark()
            work()
            self._spans.add(start, self._spans.mark(), partial(self._took, request, request.preemptions))

        return measured

    def _took(self, request: Request, turn: int, seconds: float) -> None:
        # a preempted request's prompt is computed and compressed again: one of the times is what a prompt takes
        before, total = self._found.get(request, (turn, 0.0))
        self._found[request] = turn, seconds + (total if before == turn else 0.0)

    def seconds(self) -> dict[Request, float]:
        """Of each request whose prompt was compressed, layer groups together; waits for what is still under way.

        Not of one that was over before all of its layers were merged: its prompt stayed as it was.
        """
        self._spans.finish()
        return {request: total for request, (_, total) in self._found.items() if not request.unmerged}
