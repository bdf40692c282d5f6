"""Shares of a GPU's streaming multiprocessors as people type them: ``64:64``. Syntax alone."""

from __future__ import annotations

from .numbers import whole

#: no GPU has as many
_MOST_SMS = 4096


def sm_pair(text: str) -> tuple[int, int]:
    """``24:104``: SMs of the decode lane, then of the prompt lane.

    Raises
    ------
    ValueError
        Saying what is wrong, in words that follow the value.
    """
    parts = text.split(":")
    if len(parts) != 2:
        raise ValueError("not a pair DECODE:PROMPT of SM counts")
    decode, prompt = (whole(part, 1, _MOST_SMS) for part in parts)
    return decode, prompt
