"""KL divergence from a part of every distribution: exact where the part is the whole, a lower bound elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.meters.divergence import row_divergence
from kvsuite.meters.served_divergence import LogProbabilityRows, kl_divergences, rest_probability


def rows(logits: torch.Tensor, ids: torch.Tensor) -> LogProbabilityRows:
    log_p = logits.double().log_softmax(-1)
    rest = log_p.scatter(1, ids, float("-inf")).logsumexp(-1)
    return LogProbabilityRows(ids.int().numpy(), log_p.gather(1, ids).numpy(), rest.numpy())


@given(seed=st.integers(0, 2**31), width=st.integers(1, 12), scale=st.floats(0.0, 8.0))
def test_a_lower_bound_that_the_whole_vocabulary_reaches(seed: int, width: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(5, 12, generator=generator) * 3
    arm = reference + scale * torch.randn(5, 12, generator=generator)
    ids = reference.topk(width).indices
    exact = np.array(row_divergence(arm, reference)[0].tolist())
    found = np.array(kl_divergences(rows(reference, ids), rows(arm, ids)))
    assert (found >= 0).all()
    assert (found <= exact + 1e-5).all()
    if width == 12:
        np.testing.assert_allclose(found, exact, atol=1e-5, rtol=1e-4)


def test_by_hand() -> None:
    p = LogProbabilityRows(np.array([[3]]), np.log([[0.5]]), np.log([0.5]))
    q = LogProbabilityRows(np.array([[3]]), np.log([[0.25]]), np.log([0.75]))
    assert kl_divergences(p, q) == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)])
    assert kl_divergences(p, p) == [0.0]
    assert rest_probability(q) == pytest.approx(0.75)


def test_rows_of_other_tokens_are_refused() -> None:
    p = LogProbabilityRows(np.array([[3]]), np.zeros((1, 1)), np.full(1, -np.inf))
    q = LogProbabilityRows(np.array([[4]]), np.zeros((1, 1)), np.full(1, -np.inf))
    with pytest.raises(ValueError, match="different tokens"):
        kl_divergences(p, q)
