"""Perplexity pooled over all scored tokens of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kvsuite.errors import CaseInvalid
from kvsuite.meters.quality import Perplexity, perplexity

from .measurement import Measurement

#: what `put_perplexity` keeps
POOLED = ("perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc")


def put_perplexity(
    found: Measurement,
    nll: Sequence[float],
    accuracy: float,
    *,
    dtype: str,
    weights: Sequence[float] | None = None,
    **facts: Any,
) -> Perplexity:
    """Keep perplexity with its error, the losses' sum and number, and the accuracy of the next token.

    Parameters
    ----------
    found
        Takes the metrics.
    nll
        Losses of all texts in nats; a mean of perplexities would be another, larger number.
    accuracy
        Share of tokens that the arg-max hit.
    dtype
        In which the model computed, for the message.
    weights
        As in `kvsuite.meters.quality.perplexity`.
    facts
        What must be equal for two perplexities to compare.

    Raises
    ------
    CaseInvalid
        If a loss is not finite, or their mean has no exponential.
    """
    if reason := not_finite(nll, dtype):
        raise CaseInvalid(reason)
    pooled = perplexity(nll, weights)
    found.put("perplexity", pooled.value, **facts)
    found.put("perplexity_se", pooled.standard_error, reason="one token only")
    found.put("nll_sum", pooled.nll_sum, **facts)
    found.put("nll_tokens", pooled.n)
    found.put("next_token_acc", accuracy, **facts)
    return pooled


def not_finite(nll: Sequence[float], dtype: str, whose: str = "losses") -> str | None:
    """Why there is no perplexity, and what to do; ``None`` if all losses are numbers."""
    broken = sum(not math.isfinite(x) for x in nll)
    if not broken:
        return None
    return (
        f"{broken} of {len(nll)} {whose} are not finite: the model overflows in {dtype}; give another --kv-dtype or "
        "--kv-quantization"
    )
