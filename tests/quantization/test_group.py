from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from group_reference import quantize_row, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsuite.errors import UserError
from kvsuite.quantization.formats import GROUP_FORMATS, GroupFormat
from kvsuite.quantization.group import dequantize_groups, quantize_groups

FORMATS = [pytest.param(spec, id=name) for name, spec in GROUP_FORMATS.items()]


def check(weight: Tensor, spec: GroupFormat) -> None:
    """Words, scales and dequantised values of ``weight`` equal the definition, bit for bit."""
    dtype = getattr(torch, spec.dtype)
    options = {"bits": spec.bits, "group": spec.group, "transposed": spec.transposed}
    words, scales = quantize_groups(weight, dtype=dtype, **options)
    dense = dequantize_groups(words, scales, columns=weight.shape[1], **options)
    assert words.dtype == torch.int32
    assert scales.dtype == dense.dtype == dtype
    assert dense.shape == weight.shape
    if spec.transposed:
        words, scales = words.t(), scales.t()
    assert words.shape == (weight.shape[0], spec.words(weight.shape[1]))
    assert scales.shape == (weight.shape[0], spec.groups(weight.shape[1]))
    for row, found_words, found_scales, found in zip(weight.tolist(), words, scales, dense, strict=True):
        expected_words, expected_scales, expected = quantize_row(row, spec.bits, spec.group, spec.dtype)
        assert [w & 0xFFFFFFFF for w in found_words.tolist()] == expected_words
        assert [Fraction(s) for s in found_scales.tolist()] == expected_scales
        assert [Fraction(v) for v in found.tolist()] == expected


def adversarial() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    outlier = torch.randn(2, 96, generator=random) * 1e-3
    outlier[0, 37] = 60.0
    zeros = torch.randn(3, 80, generator=random)
    zeros[1] = 0
    zeros[2, 40:] = 0
    # with 7 or 3 as the largest value the scale is 1, and every other value lies half-way between two levels
    halves = torch.tensor([[m, *(i + 0.5 for i in range(-m, m)), -m] for m in (7, 7)])
    smallest = 2.0**-24
    return {
        "ragged": torch.randn(5, 77, generator=random),
        "row": torch.randn(1, 130, generator=random),
        "column": torch.randn(9, 1, generator=random),
        "single": torch.tensor([[-0.25]]),
        "zero": torch.zeros(2, 64),
        "some_groups_zero": zeros,
        "outlier": outlier,
        "constant": torch.full((2, 70), -0.1),
        "halves_of_4_bits": halves.float(),
        "halves_of_3_bits": torch.tensor([[3, *(i + 0.5 for i in range(-3, 3)), -3]], dtype=torch.float32),
        "subnormal": torch.arange(-20, 21).float().unsqueeze(0) * smallest,
        "scale_underflows": torch.tensor([[smallest, -smallest, 0.0, smallest]]),
        "large": torch.randn(2, 50, generator=random) * 10_000,
    }


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("name", adversarial())
def test_equals_the_definition(name: str, spec: GroupFormat) -> None:
    check(adversarial()[name], spec)


def test_reference_rounds_as_torch_does():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.0 ** torch.arange(
        -30, -10
    ).repeat(10)
    assert [rounded(Fraction(v), "float16") for v in values.tolist()] == [Fraction(v) for v in values.half().tolist()]


@settings(max_examples=40)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 90),
    seed=st.integers(0, 2**31),
    spread=st.floats(-8, 4),
    spec=st.sampled_from(list(GROUP_FORMATS.values())),
)
def test_any_matrix_equals_the_definition(rows: int, columns: int, seed: int, spread: float, spec: GroupFormat) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**spread
    check(weight, spec)


@settings(max_examples=30)
@given(
    levels=st.lists(st.integers(-7, 7), min_size=1, max_size=70),
    exponent=st.integers(-10, 3),
    spec=st.sampled_from([spec for spec in GROUP_FORMATS.values() if spec.bits == 4]),
)
def test_a_matrix_on_the_grid_survives(levels: list[int], exponent: int, spec: GroupFormat) -> None:
    """Levels times a power of two, with a full-scale level in each group, come back exactly."""
    for start in range(0, len(levels), spec.group):
        levels[start] = 7
    weight = torch.tensor([levels]) * 2.0**exponent
    dtype = getattr(torch, spec.dtype)
    options = {"bits": spec.bits, "group": spec.group, "transposed": spec.transposed}
    words, scales = quantize_groups(weight, dtype=dtype, **options)
    assert torch.equal(dequantize_groups(words, scales, columns=len(levels), **options), weight.to(dtype))


def test_every_word_unpacks_to_its_values():
    random = torch.Generator().manual_seed(1)
    for bits, group in ((4, 32), (3, 40)):
        per_word, m = 32 // bits, 2 ** (bits - 1) - 1
        stored = torch.randint(0, 2 * m + 1, (3, 2 * group), generator=random)
        words = torch.tensor(
            [
                [sum(int(v) << (bits * i) for i, v in enumerate(word)) for word in row.view(-1, per_word)]
                for row in stored
            ]
        )
        signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        values = dequantize_groups(signed, torch.ones(3, 2), bits=bits, group=group, columns=2 * group)
        assert torch.equal(values, (stored - m).float())


def test_layouts_hold_the_same_values():
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(2))
    plain = quantize_groups(weight, bits=4, group=32, dtype=torch.float16)
    turned = quantize_groups(weight, bits=4, group=32, dtype=torch.float16, transposed=True)
    for a, b in zip(plain, turned, strict=True):
        assert torch.equal(a.t(), b)
        assert b.is_contiguous()


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(2))
    whole = quantize_groups(weight, bits=3, group=40, dtype=torch.float16)
    monkeypatch.setattr("kvsuite.quantization.group._SLAB", 100)
    parts = quantize_groups(weight, bits=3, group=40, dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_weight_beyond_float16_is_refused():
    with pytest.raises(UserError, match=r"--kv-quantization: .* not finite in float16; choose .*q4f32_1"):
        quantize_groups(torch.tensor([[1e6, 0.0]]), bits=4, group=32, dtype=torch.float16)
    quantize_groups(torch.tensor([[1e6, 0.0]]), bits=4, group=32, dtype=torch.float32)
