"""From per-token losses to perplexity with its error bar, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from kvsuite.errors import CaseInvalid


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


class NoExponential(CaseInvalid):
    """A mean loss so large that its exponential is no number."""


def exponential(nats: float) -> float:
    """``exp(nats)``.

    Raises
    ------
    NoExponential
        If that is larger than any number; the message says what to do.
    """
    try:
        return math.exp(nats)
    except OverflowError:
        raise NoExponential(
            f"a mean of {nats:.4g} nats has no exponential: the model's logits are far too large; check the checkpoint, or "
            "give another --kv-dtype or --kv-quantization"
        ) from None


@dataclass(frozen=True)
class Perplexity:
    """``exp(nll_sum / n)`` with llama.cpp's standard error ``ppl * sqrt(var(nll) / (n - 1))``, a lower bound.

    ``n`` is the number of scored tokens; where losses have weights, the sum of these.
    """

    nll_sum: float
    n: int
    value: float
    standard_error: float | None


def perplexity(nll: Sequence[float], weights: Sequence[float] | None = None) -> Perplexity:
    """Pool the losses of all texts; a mean of perplexities would be another, larger number.

    Parameters
    ----------
    nll
        Losses in nats.
    weights
        How much each of them counts, a whole number in all; ``None``: 1 each.

    Raises
    ------
    NoExponential
        If the mean is too large.
    """
    weights = [1.0] * len(nll) if weights is None else weights
    total = math.fsum(w * x for w, x in zip(weights, nll, strict=True))
    n = round(math.fsum(weights))
    mean = total / n
    value = exponential(mean)
    variance = math.fsum(w * (x - mean) ** 2 for w, x in zip(weights, nll, strict=True)) / n
    return Perplexity(total, n, value, value * math.sqrt(variance / (n - 1)) if n > 1 else None)


@dataclass(frozen=True)
class PairedRatio:
    """Perplexity of an arm over that of a reference on the same tokens: ``exp(mean difference)``."""

    ratio: float
    standard_error: float | None
    mean_difference: float
    difference_se: float | None


def paired_ratio(
    arm: Sequence[float], reference: Sequence[float], weights: Sequence[float] | None = None
) -> PairedRatio:
    """Compare two arms token by token: far sharper than two separate error bars, since both find the same tokens hard.

    ``weights`` as in `perplexity`.

    Raises
    ------
    ValueError
        If the arms did not score the same number of tokens.
    NoExponential
        If the mean difference is too large.
    """
    differences = [a - b for a, b in zip(arm, reference, strict=True)]
    mean = fmean(differences, weights)
    se = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    ratio = exponential(mean)
    return PairedRatio(ratio, None if se is None else ratio * se, mean, se)
