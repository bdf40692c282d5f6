"""The definition of the group formats in exact rational arithmetic, rounded to the model dtype after every operation."""

from __future__ import annotations

import struct
from fractions import Fraction

# precision, smallest exponent and struct code of the IEEE formats
_FORMATS = {"float16": (11, -24, "e"), "float32": (24, -149, "f")}


def rounded(value: Fraction, dtype: str) -> Fraction:
    """Nearest number of ``dtype``, ties to even. The tests stay below its largest number."""
    precision, smallest, _ = _FORMATS[dtype]
    if value == 0:
        return value
    exponent = abs(value).numerator.bit_length() - abs(value).denominator.bit_length() - precision - 1
    while abs(value) >= Fraction(2) ** (exponent + precision):
        exponent += 1
    unit = Fraction(2) ** max(exponent, smallest)
    # Python rounds a Fraction half to even
    return round(value / unit) * unit


def in_dtype(value: float, dtype: str) -> Fraction:
    """A Python float as the model dtype holds it."""
    code = _FORMATS[dtype][2]
    return Fraction(struct.unpack(code, struct.pack(code, value))[0])


def half_away(value: Fraction) -> int:
    """Round a number of at least 0, halves up."""
    return int(value + Fraction(1, 2))


def quantize_row(
    row: list[float], bits: int, group: int, dtype: str
) -> tuple[list[int], list[Fraction], list[Fraction]]:
    """Words (unsigned), scales and dequantised values of one row."""
    weights = [in_dtype(w, dtype) for w in row]
    m, per_word = 2 ** (bits - 1) - 1, 32 // bits
    words: list[int] = []
    scales: list[Fraction] = []
    values: list[Fraction] = []
    for start in range(0, len(row), group):
        members = weights[start : start + group]
        scale = rounded(max(abs(w) for w in members) / m, dtype)
        stored = []
        for w in members:
            # w / 0 is an infinity, which is clipped; 0 / 0 counts as 0
            underflowed = Fraction(m if w == 0 else 2 * m if w > 0 else 0)
            level = rounded(rounded(w / scale, dtype) + m, dtype) if scale else underflowed
            stored.append(min(max(half_away(max(level, Fraction(0))), 0), 2 * m))
        scales.append(scale)
        values += [rounded((s - m) * scale, dtype) for s in stored]
        stored += [0] * (group - len(stored))
        packed = [stored[first : first + per_word] for first in range(0, group, per_word)]
        words += [sum(s << (i * bits) for i, s in enumerate(word)) for word in packed]
    return words, scales, values
