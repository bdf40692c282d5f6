"""Step times of a simulation, fitted to the steps of a run: one line for steps with prompts, one for those without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.engines.results import StepServed
from kvsuite.nanovllm.simulation import AffineStepTime, StepWork

BLOCK = 16


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


def fitted(steps: Sequence[StepServed]) -> FittedStepTime:
    """Fit both lines by least squares.

    A step lasts from the end of the one before to its own, or from its start where nothing was done in between; those that
    last three times the median of their kind are left out. Blocks in use stand for the stored tokens that a step reads.

    Parameters
    ----------
    steps
        Of one lane, in order.
    """
    ends = np.array([step.end_s for step in steps])
    starts = np.array([step.start_s for step in steps])
    before = np.concatenate([starts[:1], ends[:-1]])
    # the loop sleeps where nothing is there to do
    seconds = ends - np.where(starts - before > 1e-3, starts, before)
    prompts = np.array([step.prompt_tokens for step in steps], dtype=float)
    rows = np.array([step.decode_tokens for step in steps], dtype=float)
    stored = np.array([step.used_blocks for step in steps], dtype=float) * BLOCK
    fed = prompts > 0
    with_prompts = _line(seconds[fed], [prompts[fed], *([rows[fed], stored[fed]] if (rows[fed] > 0).any() else [])])
    base, token, *more = with_prompts
    step, row, kv = _line(seconds[~fed], [rows[~fed], stored[~fed]])
    return FittedStepTime(
        AffineStepTime(base, token, *more), AffineStepTime(step, decode_row_s=row, kv_token_s=kv)
    )  # fmt: skip


def _line(seconds: np.ndarray, parts: list[np.ndarray]) -> list[float]:
    """Constant and slopes, none below 0: one that would be is left out."""
    if not len(seconds):
        return [1e-9, *[0.0] * len(parts)]
    usual = seconds <= 3 * np.median(seconds)
    seconds, parts = seconds[usual], [part[usual] for part in parts]
    used = list(range(len(parts)))
    while True:
        matrix = np.stack([np.ones_like(seconds), *[parts[index] for index in used]], axis=1)
        found = np.linalg.lstsq(matrix, seconds, rcond=None)[0]
        negative = [index for index, slope in zip(used, found[1:], strict=True) if slope < 0]
        if not negative:
            break
        used.remove(negative[0])
    slopes = dict(zip(used, found[1:].tolist(), strict=True))
    return [max(float(found[0]), 1e-9), *[slopes.get(index, 0.0) for index in range(len(parts))]]
