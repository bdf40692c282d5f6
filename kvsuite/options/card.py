"""How the memory of a device is written."""

from __future__ import annotations

import re

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible

_UNITS = {"gib": 1 << 30, "mib": 1 << 20, "gb": 10**9, "mb": 10**6, "": 1 << 30}
_CARD = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([a-zA-Z]*)")
# more than all the memory of any cluster, and still a number whose bytes are exact
_LARGEST_CARD = 1 << 53


def card_bytes(text: str, option: str) -> int:
    """Read ``24GiB``, ``24`` (GiB), ``80GB`` (10^9) or ``6144MiB``; bytes.

    Raises
    ------
    UserError
        If it is no size, naming ``option``.
    """
    found = _CARD.fullmatch(text.strip())
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or not 1 <= float(found[1]) * unit <= _LARGEST_CARD:
        raise UserError(f"{option}={visible(text, VALUE_LIMIT)}: no size of a card; use GiB, such as 24GiB")
    return int(float(found[1]) * unit)
