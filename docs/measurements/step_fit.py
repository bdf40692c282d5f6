"""Step times of a simulation, fitted to the steps of a run: one line for steps with prompts, one for those without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvsuite.engines.results import StepServed
from kvsuite.nanovllm.simulation import AffineStepTime, StepWork

BLOCK = 16
#: steps whose times are added up: with overlap a call launches its step and waits for the one before, so that a step's time is
#: in the call after its own, but for what the device did while the host still launched
WINDOW = 12
# a step takes time, however little
_LEAST_S = 1e-9


@dataclass(frozen=True)
class FittedStepTime:
    """Seconds of a step: a line in what it computes, another one where it feeds prompts.

    Parameters
    ----------
    prompts
        Of steps with prompt tokens.
    decodes
        Of steps without.
    """

    prompts: AffineStepTime
    decodes: AffineStepTime

    def __call__(self, work: StepWork) -> float:
        return (self.prompts if work.prompt_tokens else self.decodes)(work)


def fitted(runs: Sequence[Sequence[StepServed]]) -> FittedStepTime:
    """Fit both lines at once by least squares over windows of steps; nothing takes less than no time.

    Blocks in use stand for the stored tokens that a step reads.

    Parameters
    ----------
    runs
        Steps of one lane, in order.
    """
    rows, seconds = [], []
    for steps in runs:
        for first in range(0, len(steps) - WINDOW, WINDOW):
            calls = steps[first : first + WINDOW + 1]
            # the loop sleeps where nothing is there to do
            if any(after.start_s - before.end_s > 1e-3 for before, after in pairwise(calls)):
                continue
            rows.append(np.sum([_parts(step) for step in calls[:-1]], axis=0))
            seconds.append(calls[-1].end_s - calls[0].end_s)
    matrix, wanted = np.array(rows), np.array(seconds)
    used = [index for index in range(matrix.shape[1]) if matrix[:, index].any()]
    while True:
        found = np.linalg.lstsq(matrix[:, used], wanted, rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    slopes = np.zeros(matrix.shape[1])
    slopes[used] = found
    base, token, row, kv, step, decode_row, decode_kv = slopes.tolist()
    return FittedStepTime(
        AffineStepTime(max(base, _LEAST_S), token, row, kv),
        AffineStepTime(max(step, _LEAST_S), decode_row_s=decode_row, kv_token_s=decode_kv),
    )


def _parts(step: StepServed) -> list[float]:
    """What a step's time is made of: of prompts, and of decode steps."""
    stored, rows, fed = step.used_blocks * BLOCK, step.decode_tokens, step.prompt_tokens
    if fed:
        return [1, fed, rows, stored if rows else 0, 0, 0, 0]
    return [0, 0, 0, 0, 1, rows, stored]
