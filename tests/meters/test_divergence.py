from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from kvsuite.meters.divergence import TokenDivergence, row_divergence, summarise_divergence

scales = st.floats(0.01, 30)


def logits(rows: int, vocab: int, scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def kld(arm: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """By scipy in float64."""
    p, q = (np.exp(log_softmax(each.double().numpy(), axis=-1)) for each in (reference, arm))
    return rel_entr(p, q).sum(-1).tolist()


@given(scales, scales, st.integers(0, 99))
def test_rows_are_scipys(arm_scale: float, reference_scale: float, seed: int) -> None:
    arm, reference = logits(5, 300, arm_scale, seed), logits(5, 300, reference_scale, seed + 1)
    found, same = row_divergence(arm, reference)
    assert found.tolist() == pytest.approx(kld(arm, reference), rel=1e-4, abs=1e-6)
    assert same.tolist() == (arm.argmax(-1) == reference.argmax(-1)).tolist()


@given(st.floats(1e-7, 1e-3), st.integers(0, 99))
def test_small_divergences_are_never_negative(step: float, seed: int) -> None:
    reference = logits(8, 5000, 3.0, seed)
    arm = reference + step * logits(8, 5000, 1.0, seed + 1)
    found, _ = row_divergence(arm, reference)
    assert min(found.tolist()) >= 0
    # float32 without the correction of the normalisers is off by up to 6e-7
    assert found.tolist() == pytest.approx(kld(arm, reference), rel=1e-3, abs=8e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_divergence_from_itself(dtype: torch.dtype) -> None:
    same_logits = logits(20, 1000, 5.0, 0).to(dtype)
    found, same = row_divergence(same_logits, same_logits.clone())
    assert found.tolist() == [0.0] * 20
    assert all(same.tolist())


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    reference = logits(4, 100, 2.0, 0)
    found, _ = row_divergence(reference + 3.0, reference)
    assert max(found.tolist()) < 1e-6


def test_tokens_that_are_ruled_out() -> None:
    reference = torch.tensor([[0.0, 0.0, -math.inf]])
    assert row_divergence(torch.tensor([[0.0, 0.0, -math.inf]]), reference)[0].tolist() == [0.0]
    # the arm gives a third to a token that the reference rules out
    assert row_divergence(torch.zeros(1, 3), reference)[0].item() == pytest.approx(math.log(1.5))
    assert row_divergence(reference, torch.zeros(1, 3))[0].item() == math.inf


def test_summary() -> None:
    summary = summarise_divergence(
        TokenDivergence(
            nll=[-math.log(0.5), -math.log(0.2)],
            nll_reference=[-math.log(0.6), -math.log(0.5)],
            kld=[0.1, 0.3],
            same_top1=[True, False],
        )
    )
    assert (summary.n, summary.kld_mean, summary.kld_median, summary.kld_max) == (2, 0.2, 0.2, 0.3)
    assert summary.kld_p99 is None
    assert summary.same_top1 == 0.5
    assert summary.mean_delta_p == pytest.approx(-0.2)
    assert summary.rms_delta_p == pytest.approx(math.sqrt((0.01 + 0.09) / 2))


def test_the_99th_percentile_needs_100_positions() -> None:
    def p99(n: int) -> float | None:
        values = [i / 100 for i in range(n)]
        return summarise_divergence(TokenDivergence([1.0] * n, [1.0] * n, values, [True] * n)).kld_p99

    assert p99(99) is None
    assert p99(101) == pytest.approx(0.99)


@pytest.mark.parametrize("values", [[], [0.1, -1e-9]])
def test_what_cannot_be_is_refused(values: list[float]) -> None:
    n = len(values)
    with pytest.raises(ValueError, match="not negative"):
        summarise_divergence(TokenDivergence([1.0] * n, [1.0] * n, values, [True] * n))
