"""Step times of a simulation, fitted to the steps of a run: one line for steps with prompts, one for those without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.engines.results import StepServed
from kvsuite.nanovllm.simulation import AffineStepTime, StepWork

BLOCK = 16
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


def fitted(steps: Sequence[StepServed], *, overlap: bool) -> FittedStepTime:
    """Fit both lines by least squares.

    What lasts three times the median of its kind is left out. Blocks in use stand for the stored tokens that a step reads.

    Parameters
    ----------
    steps
        Of one lane, in order.
    overlap
        Whether a call launches its step before it waits for the one before: that one's time is then the call's.
    """
    ends = np.array([step.end_s for step in steps])
    starts = np.array([step.start_s for step in steps])
    seconds = np.diff(ends)
    # the loop sleeps where nothing is there to do
    known = starts[1:] - ends[:-1] < 1e-3
    index = np.flatnonzero(known) + (0 if overlap else 1)
    seconds = seconds[known]
    prompts = np.array([steps[i].prompt_tokens for i in index], dtype=float)
    rows = np.array([steps[i].decode_tokens for i in index], dtype=float)
    stored = np.array([steps[i].used_blocks for i in index], dtype=float) * BLOCK
    fed = prompts > 0
    mixed = [rows[fed], stored[fed]] if (rows[fed] > 0).any() else []
    base, token, *more = _line(seconds[fed], [prompts[fed], *mixed])
    step, row, kv = _line(seconds[~fed], [rows[~fed], stored[~fed]])
    return FittedStepTime(AffineStepTime(base, token, *more), AffineStepTime(step, decode_row_s=row, kv_token_s=kv))


def _line(seconds: np.ndarray, parts: list[np.ndarray]) -> list[float]:
    """Constant and slopes, none below 0: what would be is left out."""
    if not len(seconds):
        return [_LEAST_S, *[0.0] * len(parts)]
    usual = seconds <= 3 * np.median(seconds)
    seconds, parts = seconds[usual], [part[usual] for part in parts]
    columns = [np.ones_like(seconds), *parts]
    # of equal ones nothing is learnt but their mean: all of it goes to the first part
    used = list(range(len(columns))) if np.ptp(parts[0]) > 0.02 * parts[0].mean() else [1]
    while True:
        found = np.linalg.lstsq(np.stack([columns[index] for index in used], axis=1), seconds, rcond=None)[0]
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    slopes = dict(zip(used, found.tolist(), strict=True))
    return [max(slopes.get(0, 0.0), _LEAST_S), *[slopes.get(index, 0.0) for index in range(1, len(columns))]]
