"""How the memory of a device is written."""

from __future__ import annotations

import re

from kvsuite.errors import UserError

_UNITS = {"gib": 1 << 30, "mib": 1 << 20, "gb": 10**9, "mb": 10**6, "": 1 << 30}
_CARD = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")


def card_bytes(text: str, option: str) -> int:
    """Read ``24GiB``, ``24`` (GiB), ``80GB`` (10^9) or ``6144MiB``; bytes.

    Raises
    ------
    UserError
        If it is no size, naming ``option``.
    """
    found = _CARD.fullmatch(text.strip())
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or float(found[1]) <= 0:
        raise UserError(f"{option}={text}: no size of a card; use GiB, such as 24GiB")
    return int(float(found[1]) * unit)
