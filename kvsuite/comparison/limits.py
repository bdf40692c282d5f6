"""Limits of a rule: ``+2%``, ``-5%``, ``+16MiB``, ``+0.02``, ``off``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kvsuite.metrics.registry import MetricClass

_LIMIT = re.compile(r"([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)((?:[eE][+-]?[0-9]+)?)\s*(\S*)")
# unit of a limit: unit of the metric, factor
_UNITS = {
    "B": ("bytes", 1.0),
    "bytes": ("bytes", 1.0),
    "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20),
    "GiB": ("bytes", 2.0**30),
    "s": ("s", 1.0),
    "ms": ("s", 1e-3),
    "us": ("s", 1e-6),
}
#: what a percentage allows where the baseline is 0, in the metric's unit
ZERO_LIMITS: dict[MetricClass, float] = {"deterministic": 0.0, "near_deterministic": 1e-3, "timed": 0.0, "ambient": 0.0}


@dataclass(frozen=True)
class Limit:
    """How far a metric may move in its bad direction.

    Parameters
    ----------
    sign
        ``+``, ``-`` or nothing, as written.
    amount
        A fraction (0.02) if ``relative``, else in ``unit``; infinity for ``off``.
    relative
        Whether the amount is a share of the baseline.
    unit
        Unit of the metric that the limit is for, ``None`` for any.
    """

    sign: str
    amount: float
    relative: bool
    unit: str | None = None

    def exceeded(self, before: float, worse_by: float, kind: MetricClass) -> bool:
        """Whether ``worse_by``, in the metric's unit and positive for worse, is more than is allowed.

        A share of nothing is nothing: where ``before`` is 0, a percentage becomes the absolute limit of ``ZERO_LIMITS``.
        """
        if not self.relative:
            allowed = self.amount
        elif before == 0:
            allowed = ZERO_LIMITS[kind]
        else:
            allowed = self.amount * abs(before)
        # a change of exactly the limit is allowed, whatever the last bit of the product says
        return worse_by > allowed * (1 + 1e-9)


def parse_limit(text: str) -> Limit:
    """Parse one limit.

    Raises
    ------
    ValueError
        Saying what is wrong and what to write.
    """
    if text == "off":
        return Limit("", math.inf, relative=False)
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text or 'nothing'} is no limit; write +2%, -5%, +16MiB, +5ms, +0.02 or off")
    sign, digits, exponent, unit = found.groups()
    amount = float(digits + exponent)
    if not math.isfinite(amount):
        raise ValueError(f"{text} is no finite limit; write off to allow everything")
    if unit == "%":
        return Limit(sign, amount / 100, relative=True)
    if not unit:
        return Limit(sign, amount, relative=False)
    if unit not in _UNITS:
        raise ValueError(f"{unit} of {text} is no unit; use % or {', '.join(_UNITS)}, or none for the metric's own")
    of, factor = _UNITS[unit]
    return Limit(sign, amount * factor, relative=False, unit=of)
