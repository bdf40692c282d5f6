from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama

from kvsuite.quantization.apply import apply_quantization
from kvsuite.quantization.fake_int3 import fake_int3


@settings(max_examples=60)
@given(rows=st.integers(1, 4), columns=st.integers(1, 130), seed=st.integers(0, 2**31), spread=st.floats(-6, 6))
def test_what_rounding_to_seven_levels_promises(rows: int, columns: int, seed: int, spread: float) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**spread
    result = fake_int3(weight)
    assert result.shape == weight.shape
    for before, after in zip(weight.split(40, 1), result.split(40, 1), strict=True):
        for w, q in zip(before, after, strict=True):
            largest = float(w.abs().max())
            assert len(q.unique()) <= 7
            assert float((w - q).abs().max()) <= largest / 6 * (1 + 1e-5)
            at = int(w.abs().argmax())
            assert q[at].sign() == w[at].sign()
            assert float(q[at]) == pytest.approx(float(w[at]), rel=1e-6)


def test_levels_of_a_known_group():
    weight = torch.tensor([[3.0, 1.4, -1.6, 0.4, -3.0] + [0.0] * 35 + [0.3, -0.1, 0.06]])
    expected = torch.tensor([[3.0, 1.0, -2.0, 0.0, -3.0] + [0.0] * 35 + [0.3, -0.1, 0.1]])
    torch.testing.assert_close(fake_int3(weight), expected)


def test_a_row_of_64_has_two_groups():
    weight = torch.cat([torch.full((1, 40), 3.0), torch.full((1, 24), 0.003)], dim=1)
    weight[0, 45] = 0.001
    torch.testing.assert_close(fake_int3(weight), weight)


def test_quantised_weights_constants_and_zeros_stay():
    weight = torch.randn(5, 95, generator=torch.Generator().manual_seed(0))
    once = fake_int3(weight)
    torch.testing.assert_close(fake_int3(once), once, rtol=1e-6, atol=0)
    torch.testing.assert_close(fake_int3(torch.full((2, 41), -0.7)), torch.full((2, 41), -0.7))
    assert torch.equal(fake_int3(torch.zeros(2, 50)), torch.zeros(2, 50))


@pytest.mark.parametrize("tied", [False, True])
def test_final_layer_is_rounded_and_the_embedding_is_not(tied: bool) -> None:
    model, original = tiny_llama(tied=tied), tiny_llama(tied=tied)
    facts = apply_quantization(model, "fake_q3")
    head, table = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert torch.equal(table.weight, original.model.get_input_embeddings().weight)
    assert torch.equal(head.weight, fake_int3(original.model.get_output_embeddings().weight))
    layer, before = model.model.model.layers[1].mlp.down_proj, original.model.model.layers[1].mlp.down_proj
    assert torch.equal(layer.weight, fake_int3(before.weight))
    assert facts.quality_only
    assert facts.converted == {"Linear": 15}
    assert any("own copy" in note for note in facts.notes) == tied
    assert facts.bits_per_weight == pytest.approx(32, rel=0.01)
    assert not model.model.config.tie_word_embeddings
