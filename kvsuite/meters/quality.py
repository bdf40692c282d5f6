"""From per-token losses to perplexity with its error bar, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of one text.

    Parameters
    ----------
    targets
        Scored token ids.
    positions
        Position of every scored token in its text.
    nll
        ``-log p`` of each, in nats, from a float32 log-softmax.
    correct
        Whether the arg-max hit.
    """

    targets: list[int]
    positions: list[int]
    nll: list[float]
    correct: list[bool]


@dataclass(frozen=True)
class Perplexity:
    """``exp(nll_sum / n)`` with llama.cpp's standard error ``ppl * sqrt(var(nll) / (n - 1))``, a lower bound."""

    nll_sum: float
    n: int
    value: float
    standard_error: float | None


def perplexity(nll: Sequence[float]) -> Perplexity:
    """Pool the losses of all texts; a mean of perplexities would be another, larger number."""
    total, n = math.fsum(nll), len(nll)
    value = math.exp(total / n)
    mean = total / n
    variance = math.fsum((x - mean) ** 2 for x in nll) / n
    return Perplexity(total, n, value, value * math.sqrt(variance / (n - 1)) if n > 1 else None)


@dataclass(frozen=True)
class PairedRatio:
    """Perplexity of an arm over that of a reference on the same tokens: ``exp(mean difference)``."""

    ratio: float
    standard_error: float | None
    mean_difference: float
    difference_se: float | None


def paired_ratio(arm: Sequence[float], reference: Sequence[float]) -> PairedRatio:
    """Compare two arms token by token: far sharper than two separate error bars, since both find the same tokens hard.

    Raises
    ------
    ValueError
        If the arms did not score the same number of tokens.
    """
    differences = [a - b for a, b in zip(arm, reference, strict=True)]
    mean = fmean(differences)
    se = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    ratio = math.exp(mean)
    return PairedRatio(ratio, None if se is None else ratio * se, mean, se)
