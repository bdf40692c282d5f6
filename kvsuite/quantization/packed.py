"""A weight matrix in packed form: words, scales and how they are read back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .formats import GroupFormat
from .group import dequantize_groups, quantize_groups


class PackedWeight(nn.Module):
    """A packed matrix. A module of its own, so that a tied table stays one tensor whatever `nn.Module.to` does.

    Parameters
    ----------
    words, scales
        As `kvsuite.quantization.group.quantize_groups` returns them.
    columns
        Input features.
    spec
        The format.
    transposed
        Whether the tensors lie input-major.
    """

    words: Tensor
    scales: Tensor

    def __init__(self, words: Tensor, scales: Tensor, *, columns: int, spec: GroupFormat, transposed: bool) -> None:
        super().__init__()
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.rows = words.shape[1] if transposed else words.shape[0]
        self.columns = columns
        self.spec = spec
        self.transposed = transposed

    @classmethod
    def pack(cls, weight: Tensor, spec: GroupFormat, *, transposed: bool) -> PackedWeight:
        """Quantise ``weight`` ``[rows, columns]``."""
        words, scales = quantize_groups(
            weight, bits=spec.bits, group=spec.group, dtype=getattr(torch, spec.dtype), transposed=transposed
        )
        return cls(words, scales, columns=weight.shape[1], spec=spec, transposed=transposed)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Dequantised rows ``[start, stop)``, ``[rows, columns]``."""
        part = slice(start, stop)
        if self.transposed:
            return self._dense(self.words[:, part], self.scales[:, part], transposed=True)
        return self._dense(self.words[part], self.scales[part])

    def gather(self, index: Tensor) -> Tensor:
        """Dequantised rows ``index`` ``[n]`` of a table that lies row by row, ``[n, columns]``."""
        assert not self.transposed
        return self._dense(self.words[index], self.scales[index])

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.columns}, {self.spec.bits} bits, groups of {self.spec.group}"

    def _dense(self, words: Tensor, scales: Tensor, *, transposed: bool = False) -> Tensor:
        return dequantize_groups(
            words, scales, bits=self.spec.bits, group=self.spec.group, columns=self.columns, transposed=transposed
        )
