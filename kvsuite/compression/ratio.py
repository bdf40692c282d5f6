"""Ratios and counts, exact on the decimal the user wrote: the one place that converts between ours and kvpress'."""

from __future__ import annotations

import math
from fractions import Fraction

from kvsuite.errors import UserError

_OPTION = "--kv-keep-ratios"


def removed_from_keep(keep_ratio: float) -> float:
    """Convert our fraction kept into kvpress' fraction removed.

    Parameters
    ----------
    keep_ratio
        Fraction of the cache kept, in (0, 1].

    Returns
    -------
    float
        kvpress' ``compression_ratio`` in [0, 1): the float nearest to ``1 - keep_ratio`` on the decimals, so 0.9 gives
        0.1 and not 0.09999999999999998.

    Raises
    ------
    UserError
        If the ratio is not in (0, 1].
    """
    return float(1 - _exact_keep(keep_ratio))


def keep_count(length: int, keep_ratio: float) -> int:
    """Number of ``length`` tokens that a keep ratio keeps, rounded up: ``ceil(length * keep_ratio)`` on the decimal.

    Raises
    ------
    UserError
        If the ratio is not in (0, 1] or the length is negative.
    """
    return math.ceil(_exact_size(length) * _exact_keep(keep_ratio))


def protected_count(size: int, ratio: float) -> int:
    """Number of ``size`` cache slots a ratio protects, rounded down: ``floor(size * ratio)`` on the decimal.

    ``int(100 * 0.29)`` is 28, because the float 0.29 lies below the decimal; this gives 29. A ratio of 0 protects
    nothing, 1 everything.

    Raises
    ------
    UserError
        If the ratio is not in [0, 1] or the size is negative.
    """
    return math.floor(_exact_size(size) * _exact(ratio, low_open=False))


def removed_by_factor(factor: float) -> float:
    """Fraction removed where one of ``factor`` tokens stays: the float nearest to ``1 - 1 / factor``, so 5 gives 0.8."""
    return float(1 - 1 / Fraction(repr(float(factor))))


def factor_count(length: int, factor: float, *, kvpress_compat: bool = False) -> int:
    """Number of ``length`` tokens that stay where one of ``factor`` does: ``floor(length / factor)``, at least 1.

    Parameters
    ----------
    length
        Tokens, at least 1.
    factor
        At least 1; taken as the decimal that the user wrote.
    kvpress_compat
        Count as kvpress does, ``int(length * (1 - ratio))`` with the float ``ratio = 1 - 1 / factor``: 1 - 0.8 is
        0.19999999999999996, so that 799 and not 800 of 4000 tokens stay at a factor of 5.
    """
    if kvpress_compat:
        ratio = 1 - 1 / factor
        return max(1, int(length * (1 - ratio)))
    return max(1, math.floor(_exact_size(length) / Fraction(repr(float(factor)))))


def _exact_keep(keep_ratio: float) -> Fraction:
    return _exact(keep_ratio, low_open=True)


def _exact(ratio: float, *, low_open: bool) -> Fraction:
    number = float(ratio)
    # written so that NaN fails as well
    if isinstance(ratio, bool) or not (number > 0 if low_open else number >= 0) or not number <= 1:
        interval = "(0, 1]" if low_open else "[0, 1]"
        raise UserError(f"{_OPTION}={ratio!r}: a ratio is a fraction in {interval}; write 0.5 for one half")
    return Fraction(repr(number))


def _exact_size(size: int) -> int:
    if size < 0:
        raise UserError(f"{_OPTION}: cannot take a part of {size} tokens; the size must be at least 0")
    return size
