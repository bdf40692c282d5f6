"""Numbers as people type them, within bounds: the one place where the text of a number is read. Imports nothing.

Python reads more than a command line should hold: digits of other alphabets, ``1_000``, ``+5``, spaces inside. Such text is
refused rather than guessed, and a number out of its bounds before it is converted or anything is made of that size.
"""

from __future__ import annotations

import math
import re

_WHOLE = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
# no bound of ours has more digits
_MOST_DIGITS = 40

#: tokens of a text, a prompt or a cache, more than any model was trained for
MOST_TOKENS = 10_000_000
#: rounds, samples and repetitions of any kind
MOST_REPEATS = 100_000
#: requests of a batch
MOST_REQUESTS = 65_536
#: seeds are numbers of 64 bits, as torch and numpy take them
MOST_SEED = 2**64 - 1
#: a share or ratio below is nothing
LEAST_RATIO = 1e-6


def whole(text: str, least: int, most: int) -> int:
    """A whole number.

    Parameters
    ----------
    text
        Digits 0 to 9, with a minus before them where ``least`` allows it.
    least, most
        Both are allowed.

    Raises
    ------
    ValueError
        Saying what is wrong, in words that follow the value.
    """
    typed = text.strip()
    if not _WHOLE.fullmatch(typed):
        raise ValueError(f"not a whole number{_spelling(typed)}")
    digits = typed.lstrip("-").lstrip("0") or "0"
    # as many digits as decide it: Python refuses to convert thousands of them
    value = int(digits[:_MOST_DIGITS]) * (-1 if typed.startswith("-") else 1)
    if value < least:
        raise ValueError(f"must be at least {least}")
    if value > most:
        raise ValueError(f"must be at most {most}")
    return value


def decimal(text: str) -> float:
    """A finite number such as ``0.5``, ``.5``, ``1e-3``.

    Raises
    ------
    ValueError
        Saying what is wrong, in words that follow the value.
    """
    typed = text.strip()
    if not _DECIMAL.fullmatch(typed):
        raise ValueError(f"not a number{_spelling(typed)}")
    value = float(typed)
    if not math.isfinite(value):
        raise ValueError("is too large a number")
    return value


def _spelling(typed: str) -> str:
    """What to type instead, where Python alone would read the text."""
    try:
        float(typed)
    except ValueError:
        return ""
    return "" if typed.lower().lstrip("+-") in ("nan", "inf", "infinity") else "; use the digits 0 to 9 alone"
