"""Metrics of how far a cache's or a format's predictions are from a reference's, and the mark of a trap."""

from __future__ import annotations

from typing import Any

from kvsuite.meters.divergence import TokenDivergence, is_trap, summarise_divergence
from kvsuite.meters.quality import paired_ratio

from .measurement import Measurement

#: the metrics that `put_divergence` writes
DIVERGENCE = (
    "kld", "kld_se", "kld_median", "kld_p99", "kld_max", "same_top1", "rms_delta_p", "mean_delta_p",
)  # fmt: skip
#: of a cache, also in nats and paired
CACHE_DIVERGENCE = (*DIVERGENCE, "nll_difference", "nll_difference_se")


def put_divergence(found: Measurement, tokens: TokenDivergence, **facts: Any) -> None:
    """Write the metrics of `DIVERGENCE`."""
    summary = summarise_divergence(tokens)
    found.put("kld", summary.kld_mean, **facts)
    found.put("kld_se", summary.kld_se, reason="one token only", **facts)
    found.put("kld_median", summary.kld_median, **facts)
    found.put("kld_p99", summary.kld_p99, reason="fewer than 100 positions", **facts)
    found.put("kld_max", summary.kld_max, **facts)
    for name in ("same_top1", "rms_delta_p", "mean_delta_p"):
        found.put(name, getattr(summary, name), **facts)


def put_cache_divergence(found: Measurement, tokens: TokenDivergence, **facts: Any) -> None:
    """Write the metrics of `CACHE_DIVERGENCE`, and warn of a `trap`."""
    put_divergence(found, tokens, **facts)
    pair = paired_ratio(tokens.nll, tokens.nll_reference)
    found.put("nll_difference", pair.mean_difference, **facts)
    found.put("nll_difference_se", pair.difference_se, reason="one token only", **facts)
    if marked := trap(tokens):
        found.warnings.append(marked)


def trap(tokens: TokenDivergence) -> str | None:
    """What to say of a cache that is a trap (`kvsuite.meters.divergence.is_trap`); ``None`` for others."""
    difference = paired_ratio(tokens.nll, tokens.nll_reference).mean_difference
    same = sum(tokens.same_top1) / len(tokens.same_top1)
    if not is_trap(difference, same):
        return None
    return (
        f"trap: the mean loss is {-difference:.4f} nats better than the full cache's, and {1 - same:.1%} of the most "
        "likely tokens are others: perplexity alone would call this an improvement"
    )
