"""How far the continuation that a loaded server gives is from the dense one's, from a part of every distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LogProbabilityRows:
    """Part of the distribution at ``n`` positions: ``k`` tokens each, and all others as one.

    Parameters
    ----------
    ids
        int32 ``[n, k]``.
    log_p
        Natural logarithms of their probabilities, float32 ``[n, k]``.
    log_rest
        Of the probability of all other tokens together, float32 ``[n]``; minus infinity where there is none.
    """

    ids: NDArray[Any]
    log_p: NDArray[Any]
    log_rest: NDArray[Any]


def kl_divergences(reference: LogProbabilityRows, arm: LogProbabilityRows) -> list[float]:
    """KL divergence of every position in nats, the tokens that are not in the rows taken as one.

    Merging tokens never makes a divergence larger (the log-sum inequality), so each value is a lower bound of the whole
    distribution's, and equals it where ``k`` is the vocabulary. What is lost is how the arm shares out among the merged
    tokens what it gives them together; how much that can be is told by `rest_probability`.

    Raises
    ------
    ValueError
        If the rows are not of the same tokens.
    """
    if reference.ids.shape != arm.ids.shape or (reference.ids != arm.ids).any():
        raise ValueError("rows of different tokens: the arm's must be of the reference's tokens")
    log_p, log_q = (
        np.concatenate([rows.log_p, rows.log_rest[:, None]], axis=1).astype(np.float64) for rows in (reference, arm)
    )
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        # q - p sums to 0 but for the rounding of both normalisers, which it takes away: every term is then non-negative. A
        # token that the reference rules out adds q alone (0 * inf is not a number)
        terms = np.where(p > 0, p * (log_p - log_q), 0.0) + (q - p)
    found: list[float] = np.maximum(terms.sum(axis=1), 0.0).tolist()
    return found


def rest_probability(rows: LogProbabilityRows) -> float:
    """Mean probability of what the rows take as one."""
    return float(np.exp(rows.log_rest.astype(np.float64)).mean())
