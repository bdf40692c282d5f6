"""Keys and values as a cache format stores them: tensors with a row a token, or a row a group of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.cache_formats.pack import Packed, pack, refuse_vectors, refused_vectors, unpack


class PackedForm:
    """Turns keys and values ``[batch, heads, n, head_dim]`` into the tensors that are stored, and back.

    Parameters
    ----------
    chosen
        The format.
    dtype
        Of the model, in which keys and values come back.
    """

    def __init__(self, chosen: CacheFormat, dtype: torch.dtype) -> None:
        self.format = chosen
        self._dtype = dtype
        self._sides = (chosen.keys, chosen.values)
        self._refused: Tensor | None = None

    def pieces(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Tensors that are stored for keys, then for values; what is not finite is noted (`refuse`)."""
        return [
            piece
            for side, vectors in zip(self._sides, (keys, values), strict=True)
            for piece in self._of(side, vectors)
        ]

    def whole(self, pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of stored tensors."""
        left = list(pieces)
        keys, values = (self._back(side, left) for side in self._sides)
        return keys, values

    def through(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens as they are read once they are stored.

        Where groups of tokens are packed, those of a text from its first, behind the last whole group as they are.
        """
        tokens = keys.shape[2]
        whole = self.format.boundary(tokens) if self.format.token_group > 1 else tokens
        if not whole:
            return keys, values
        read = self.whole(self.pieces(keys[:, :, :whole], values[:, :, :whole]))
        if whole == tokens:
            return read
        rest = (keys[:, :, whole:], values[:, :, whole:])
        return torch.cat((read[0], rest[0]), 2), torch.cat((read[1], rest[1]), 2)

    def tokens_of_row(self) -> list[int]:
        """Tokens that a row of each stored tensor is for: per channel a group's scales are one row."""
        return [
            tokens
            for side in self._sides
            for tokens in ([1] if not side.is_packed else [1, side.token_group] if side.numbers_of_group else [1])
        ]

    def refuse(self) -> None:
        """Refuse what was not finite since the last call; waits for the device.

        Raises
        ------
        CaseInvalid
            If there was any.
        """
        refused, self._refused = self._refused, None
        if refused is not None:
            refuse_vectors(refused, str(self.format))

    def _of(self, side: SideFormat, vectors: Tensor) -> list[Tensor]:
        if not side.is_packed:
            return [vectors]
        packed = pack(side, vectors)
        found = refused_vectors(side, vectors, packed)
        self._refused = found if self._refused is None else self._refused | found
        return [packed.codes, packed.scales] if side.numbers_of_group else [packed.codes]

    def _back(self, side: SideFormat, left: list[Tensor]) -> Tensor:
        codes = left.pop(0)
        if not side.is_packed:
            return codes
        scales = left.pop(0) if side.numbers_of_group else codes.new_empty(0, dtype=torch.float16)
        return unpack(side, Packed(codes, scales), self._dtype)
