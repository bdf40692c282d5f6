from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.meters.quality import paired_ratio, perplexity

LOSSES = st.lists(st.floats(0, 15), min_size=2, max_size=60)


def test_perplexity_of_known_losses() -> None:
    nll = [math.log(2), math.log(8)]
    found = perplexity(nll)
    assert found.value == pytest.approx(4)
    assert found.n == 2
    assert found.nll_sum == pytest.approx(math.log(16))
    # variance over n, error over n - 1: llama.cpp's rule
    assert found.standard_error == pytest.approx(4 * math.sqrt(math.log(2) ** 2 / 1))


def test_one_token_has_no_error_bar() -> None:
    assert perplexity([2.0]).standard_error is None
    assert paired_ratio([2.0], [1.0]).standard_error is None
    assert paired_ratio([2.0], [1.0]).ratio == pytest.approx(math.e)


def test_defect_07_texts_are_pooled_and_not_averaged() -> None:
    easy, hard = [1.0] * 30, [4.0] * 10
    pooled = perplexity(easy + hard).value
    assert pooled == pytest.approx(math.exp((30 + 40) / 40))
    mean_of_texts = (perplexity(easy).value + perplexity(hard).value) / 2
    assert mean_of_texts > 4 * pooled


@given(vocab=st.integers(2, 200_000), n=st.integers(2, 50))
def test_a_uniform_model_is_as_good_as_its_vocabulary(vocab: int, n: int) -> None:
    found = perplexity([math.log(vocab)] * n)
    assert found.value == pytest.approx(vocab, rel=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-6 * vocab)


@given(nll=LOSSES)
def test_order_and_copies(nll: list[float]) -> None:
    found = perplexity(nll)
    assert perplexity(nll[::-1]).value == pytest.approx(found.value, rel=1e-12)
    assert perplexity(nll * 3).value == pytest.approx(found.value, rel=1e-12)
    assert found.value == pytest.approx(math.exp(found.nll_sum / found.n))


@given(nll=LOSSES, shift=st.floats(-1, 1))
def test_a_constant_difference_has_no_error(nll: list[float], shift: float) -> None:
    found = paired_ratio([x + shift for x in nll], nll)
    assert found.ratio == pytest.approx(math.exp(shift))
    assert found.mean_difference == pytest.approx(shift, abs=1e-9)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_pairing_is_sharper_than_two_error_bars() -> None:
    reference = [0.1 * (i % 50) for i in range(500)]
    arm = [x + 0.03 + 0.001 * (i % 7) for i, x in enumerate(reference)]
    paired = paired_ratio(arm, reference)
    separate = perplexity(arm).standard_error
    assert paired.standard_error is not None
    assert separate is not None
    assert paired.standard_error < separate / 100
    assert paired.difference_se is not None
    assert paired.mean_difference > 4 * paired.difference_se
    assert paired.ratio == pytest.approx(perplexity(arm).value / perplexity(reference).value)


def test_arms_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_ratio([1.0, 2.0], [1.0])
