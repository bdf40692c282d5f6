"""How far an arm's predictions are from a reference's: KL divergence, agreement, change in probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING

from kvsuite.metrics.registry import percentile

if TYPE_CHECKING:
    from torch import Tensor


def is_trap(nll_difference: float, same_top1: float) -> bool:
    """Whether a mean loss is better than the reference's although other tokens are the most likely ones.

    Such an arm does not predict better, it predicts something else that this text happens to like; perplexity alone would
    call it an improvement.

    Parameters
    ----------
    nll_difference
        Mean loss minus the reference's, in nats.
    same_top1
        Share of positions where both rank the same token first.
    """
    return nll_difference < 0 and same_top1 < 1


@dataclass(frozen=True)
class TokenDivergence:
    """Two arms on the same targets, position by position.

    Parameters
    ----------
    nll, nll_reference
        ``-log p`` of the target, in nats.
    kld
        ``sum over v of P_ref(v) * (log P_ref(v) - log P_arm(v))``, in nats.
    same_top1
        Whether both arms rank the same token first.
    """

    nll: list[float]
    nll_reference: list[float]
    kld: list[float]
    same_top1: list[bool]


def joined_divergence(found: Sequence[TokenDivergence]) -> TokenDivergence:
    """Several texts as one."""
    return TokenDivergence(
        nll=[x for one in found for x in one.nll],
        nll_reference=[x for one in found for x in one.nll_reference],
        kld=[x for one in found for x in one.kld],
        same_top1=[x for one in found for x in one.same_top1],
    )


@dataclass(frozen=True)
class Divergence:
    """Summary of a `TokenDivergence`, as llama-perplexity's ``--kl-divergence`` has it.

    Parameters
    ----------
    n
        Number of positions.
    kld_mean, kld_se, kld_median, kld_p99, kld_max
        In nats; the 99th percentile is ``None`` below 100 positions, the standard error of the mean at a single one.
    same_top1
        Share of positions where both arms rank the same token first.
    rms_delta_p
        Root mean square of the target's change in probability, ``p_arm - p_ref``; a number in [0, 1], not per cent.
    mean_delta_p
        Mean of the same change: negative where the arm is worse.
    """

    n: int
    kld_mean: float
    kld_se: float | None
    kld_median: float
    kld_p99: float | None
    kld_max: float
    same_top1: float
    rms_delta_p: float
    mean_delta_p: float


def summarise_divergence(tokens: TokenDivergence) -> Divergence:
    """Summarise two arms.

    Raises
    ------
    ValueError
        If there is no position, or a divergence is negative, which none can be.
    """
    if not tokens.kld or min(tokens.kld) < 0:
        raise ValueError(f"KL divergences must be there and not negative, found {tokens.kld[:3]} ...")
    delta = [math.exp(-a) - math.exp(-b) for a, b in zip(tokens.nll, tokens.nll_reference, strict=True)]
    return Divergence(
        n=len(tokens.kld),
        kld_mean=fmean(tokens.kld),
        kld_se=stdev(tokens.kld) / math.sqrt(len(tokens.kld)) if len(tokens.kld) > 1 else None,
        kld_median=median(tokens.kld),
        kld_p99=percentile(tokens.kld, 0.99),
        kld_max=max(tokens.kld),
        same_top1=fmean(tokens.same_top1),
        rms_delta_p=math.sqrt(fmean(d * d for d in delta)),
        mean_delta_p=fmean(delta),
    )


def row_divergence(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence of each row from the reference's, and whether the arg-max is the same.

    Parameters
    ----------
    logits, reference
        ``[rows, vocab]``, any float dtype; the log-softmax is float32.

    Returns
    -------
    tuple[Tensor, Tensor]
        float32 ``[rows]`` in nats, and bool ``[rows]``. Equal logits give exactly 0.
    """
    import torch

    same = logits.argmax(-1) == reference.argmax(-1)
    arm = torch.log_softmax(logits.float(), dim=-1)
    ref = torch.log_softmax(reference.float(), dim=-1)
    p_ref = ref.exp()
    # adding p_arm - p_ref, which sums to 0, takes away the rounding of both normalisers: without it float32 leaves
    # 1e-7 of either sign. A token that the reference rules out adds p_arm alone (0 * inf is not a number)
    terms = torch.where(p_ref > 0, p_ref * (ref - arm), 0.0) + (arm.exp() - p_ref)
    return terms.sum(-1).clamp_min(0.0), same
