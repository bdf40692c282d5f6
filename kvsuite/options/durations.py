"""Times as people type them: a number with a unit. Imports nothing."""

from __future__ import annotations

import math
import re

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(s|ms|us|µs)")


def duration(text: str) -> float:
    """Seconds of ``25ms``, ``1.5s`` or ``100us``.

    Raises
    ------
    ValueError
        If it is no number with one of these units, or not more than 0.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError("is no time; write a number with s, ms or us")
    seconds = float(found[1]) * _SECONDS[found[2]]
    if not 0 < seconds < math.inf:
        raise ValueError("must be more than 0")
    return seconds
