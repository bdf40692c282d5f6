"""The group formats of MLC as numbers: bits, group, dtype, layout. No torch."""

from __future__ import annotations

from dataclasses import dataclass

_WORD_BITS = 32


@dataclass(frozen=True)
class GroupFormat:
    """One of MLC's ``qBfX_v`` formats with B below 16.

    Parameters
    ----------
    bits
        Bits of a stored value, 3 or 4.
    group
        Neighbours along the input dimension that share a scale.
    dtype
        Compute dtype, also that of the scales: ``float16`` or ``float32``.
    transposed
        Linear weights lie input x output (MLC's ``KN``); embedding tables never do.
    ends
        Whether embeddings and the final layer are quantised as well.
    """

    bits: int
    group: int
    dtype: str
    transposed: bool = False
    ends: bool = True

    @property
    def maximum(self) -> int:
        """Largest level m; levels are -m ... m, stored as 0 ... 2m."""
        return max_level(self.bits)

    def words(self, columns: int) -> int:
        """32-bit words of a row of ``columns`` inputs, the padding of its last group included."""
        return self.groups(columns) * (self.group // values_per_word(self.bits))

    def groups(self, columns: int) -> int:
        """Scales of a row of ``columns`` inputs."""
        return -(-columns // self.group)

    def bytes(self, rows: int, columns: int, element_bytes: int) -> int:
        """Bytes of a packed ``rows x columns`` matrix whose scales take ``element_bytes`` each."""
        return rows * (4 * self.words(columns) + element_bytes * self.groups(columns))


def max_level(bits: int) -> int:
    """m = 2^(B-1) - 1."""
    return (1 << (bits - 1)) - 1


def values_per_word(bits: int) -> int:
    """Values in a 32-bit word: 8 of 4 bits, 10 of 3 bits."""
    return _WORD_BITS // bits


#: mlc_llm/quantization/quantization.py
#: elements of a packed matrix that are dequantised at a time on CUDA, where a product has many tokens
DENSE_TILE = 1 << 26

GROUP_FORMATS: dict[str, GroupFormat] = {
    "q3f16_1": GroupFormat(3, 40, "float16"),
    "q4f16_0": GroupFormat(4, 32, "float16", transposed=True),
    "q4f16_1": GroupFormat(4, 32, "float16"),
    "q4f16_2": GroupFormat(4, 32, "float16", ends=False),
    "q4f32_1": GroupFormat(4, 32, "float32"),
}
#: no quantisation, another dtype
CAST_FORMATS: dict[str, str] = {"q0f16": "float16", "q0f32": "float32"}
