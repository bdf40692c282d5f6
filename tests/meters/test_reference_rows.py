"""A reference kept in 16 bits a log-probability gives the divergences of the exact one."""

from __future__ import annotations

import pytest
import torch

from kvsuite.meters.divergence import row_divergence
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.reference_rows import ReferenceRows, RowComparison


def logits(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    return 4 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def kept(rows: torch.Tensor) -> ReferenceRows:
    found = ReferenceRows()
    for at in range(len(rows)):
        found.add(at, rows[at : at + 1])
    found.scores = TokenScores([0] * len(rows), list(range(len(rows))), [1.0] * len(rows), [False] * len(rows))
    return found


def compared(reference: ReferenceRows, rows: torch.Tensor) -> list[float]:
    arm = RowComparison(reference)
    for at in range(len(rows)):
        arm.add(at, rows[at : at + 1])
    return arm.found(TokenScores([0] * len(rows), list(range(len(rows))), [1.0] * len(rows), [False] * len(rows))).kld


@pytest.mark.parametrize("noise", [1e-3, 0.03, 1.0])
def test_divergences_are_those_of_the_exact_rows(noise: float) -> None:
    exact = logits(20, 5000, 1)
    arm = exact + noise * logits(20, 5000, 2)
    wanted = row_divergence(arm, exact)[0]
    found = torch.tensor(compared(kept(exact), arm))
    assert ((found - wanted).abs() <= 2e-4 * wanted.sqrt() + 1e-7).all()


def test_an_equal_cache_has_a_divergence_of_next_to_nothing() -> None:
    exact = logits(20, 5000, 1)
    assert max(compared(kept(exact), exact)) < 2e-7


def test_a_token_that_cannot_come_stays_one() -> None:
    exact = logits(2, 50, 1)
    exact[:, 7] = -torch.inf
    row = kept(exact).row(1, "cpu")
    assert row[0, 7] == -torch.inf
    assert row[0].isfinite().sum() == 49
    assert max(compared(kept(exact), exact)) < 2e-7


def test_the_most_likely_token_is_the_exact_one_where_two_round_alike() -> None:
    exact = torch.zeros(1, 4000)
    exact[0, 0] = -60.0
    exact[0, 100:102] = torch.tensor([1.0, 1.0 + 1e-5])
    reference = kept(exact)
    assert reference.top1 == [101]
    arm = RowComparison(reference)
    arm.add(0, exact)
    scores = TokenScores([0], [1], [1.0], [False])
    assert arm.found(scores).same_top1 == [True]


def test_rows_come_in_order() -> None:
    with pytest.raises(ValueError, match="row 3 after 0 rows"):
        ReferenceRows().add(3, torch.zeros(1, 4))
