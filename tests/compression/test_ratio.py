"""Ratios are exact on the decimal that was written."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.compression.ratio import keep_count, protected_count, removed_from_keep
from kvsuite.errors import UserError

HUNDREDTHS = st.integers(1, 100)


@pytest.mark.parametrize(
    ("size", "ratio", "protected"),
    [
        (512, 0.2, 102),
        (512, 0.3, 153),
        (512, 0.5, 256),
        (512, 0.8, 409),
        (256, 0.2, 51),
        (256, 0.3, 76),
        (256, 0.5, 128),
        (256, 0.8, 204),
        (100, 0.29, 29),
        (5, 0.4, 2),
        (7, 0.0, 0),
        (7, 1.0, 7),
    ],
)
def test_protected_count_of_the_published_sizes(size: int, ratio: float, protected: int) -> None:
    assert protected_count(size, ratio) == protected


@pytest.mark.parametrize(
    ("length", "ratio", "kept"),
    [(7, 0.5, 4), (101, 0.8, 81), (101, 0.5, 51), (101, 0.3, 31), (100, 0.29, 29), (100, 0.07, 7), (9, 1.0, 9)],
)
def test_keep_count_rounds_up(length: int, ratio: float, kept: int) -> None:
    assert keep_count(length, ratio) == kept


def test_float_arithmetic_would_be_wrong_where_this_is_right() -> None:
    assert int(100 * 0.29) == 28
    assert math.ceil(100 * 0.07) == 8
    assert 1 - 0.9 != removed_from_keep(0.9) == 0.1


@given(HUNDREDTHS, st.integers(0, 200_000))
def test_counts_equal_integer_arithmetic(percent: int, length: int) -> None:
    ratio = percent / 100
    assert protected_count(length, ratio) == length * percent // 100
    assert keep_count(length, ratio) == -(-length * percent // 100)
    assert removed_from_keep(ratio) == (100 - percent) / 100


@given(st.floats(min_value=0, max_value=1, exclude_min=True, allow_subnormal=False), st.integers(1, 10_000))
def test_any_ratio_keeps_something_and_never_more_than_there_is(ratio: float, length: int) -> None:
    assert 1 <= keep_count(length, ratio) <= length
    assert 0 <= keep_count(length, ratio) - protected_count(length, ratio) <= 1
    assert 0 <= removed_from_keep(ratio) <= 1
    assert abs(Fraction(removed_from_keep(ratio)) + Fraction(ratio) - 1) < Fraction(1, 2**52)


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, 50, math.nan, math.inf, True])
def test_a_keep_ratio_outside_the_interval_is_refused_by_name(ratio: float) -> None:
    for call in (removed_from_keep, lambda r: keep_count(10, r)):
        with pytest.raises(UserError, match=r"--kv-keep-ratios=.*\(0, 1\]"):
            call(ratio)


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan])
def test_a_protected_ratio_outside_the_interval_is_refused_by_name(ratio: float) -> None:
    with pytest.raises(UserError, match=r"--kv-keep-ratios=.*\[0, 1\]"):
        protected_count(10, ratio)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UserError, match="at least 0"):
        protected_count(-1, 0.5)
