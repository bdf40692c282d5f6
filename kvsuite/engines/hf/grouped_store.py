"""Keys and values of one layer where groups of tokens are packed together: whole groups packed, the tokens behind them not."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsuite.cache_formats.cache_format import CacheFormat

from .cache_store import Hole, Store
from .packed_form import PackedForm


class GroupedStore(Store):
    """Packs a group once its last token has left the residual window of the newest query. Nothing is removed from it.

    Parameters
    ----------
    capacity
        Tokens to reserve packed rows for.
    form
        How groups are packed.
    """

    def __init__(self, capacity: int, form: PackedForm) -> None:
        self._capacity = capacity
        self._form = form
        self._format: CacheFormat = form.format
        self._rows = form.tokens_of_row()
        self._buffers: list[Tensor] = []
        self._packed = 0
        self._tail: tuple[Tensor, Tensor] | None = None

    @property
    def tail(self) -> tuple[Tensor, Tensor, int]:
        """Keys and values of the tokens that are not packed, and the position of the first of them."""
        if self._tail is None:
            raise RuntimeError("the layer has seen no token yet")
        return *self._tail, self._packed

    def load(self, keys: Tensor, values: Tensor) -> None:
        self._packed, self._tail = 0, None
        self.append(keys, values, 0, None)

    def append(self, keys: Tensor, values: Tensor, slots: int, hole: Hole) -> tuple[Tensor, Tensor]:
        if hole is not None:
            raise RuntimeError("a group of tokens has no slots to reuse")
        if slots == 0:
            self._packed, self._tail = 0, None
        seen = slots + keys.shape[2]
        if self._tail is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(self._tail, (keys, values), strict=True))
        ready = self._format.boundary(seen) - self._packed
        if ready:
            self._pack(keys[:, :, :ready], values[:, :, :ready])
        # a slice would keep all of a prompt, or of a fused projection, alive
        self._tail = keys[:, :, ready:].clone(), values[:, :, ready:].clone()
        return self.view(seen)

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        end = self._packed + keys.shape[2]
        pieces = self._form.pieces(keys, values)
        if not self._buffers or end > self._capacity:
            self._capacity = max(self._capacity, end) if not self._buffers else max(2 * self._capacity, end)
            grown = [
                piece.new_empty(*piece.shape[:2], -(-self._capacity // tokens), piece.shape[3])
                for piece, tokens in zip(pieces, self._rows, strict=True)
            ]
            for new, old in zip(grown, self._buffers, strict=False):
                new[:, :, : old.shape[2]] = old
            self._buffers = grown
        for own, new, tokens in zip(self._buffers, pieces, self._rows, strict=True):
            own[:, :, self._packed // tokens : end // tokens] = new
        self._packed = end

    def select(self, keep: Tensor, slots: int) -> None:
        raise RuntimeError("tokens of a group are packed together: none of them can go alone")

    def view(self, slots: int) -> tuple[Tensor, Tensor]:
        keys, values, packed = self.tail
        if not packed:
            return keys, values
        stored = [own[:, :, : packed // tokens] for own, tokens in zip(self._buffers, self._rows, strict=True)]
        old_keys, old_values = self._form.whole(stored)
        return torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)

    def tensors(self) -> list[Tensor]:
        return [*self._buffers, *(self._tail or ())]

    def headroom(self, slots: int) -> int:
        rows = zip(self._buffers, self._rows, strict=bool(self._buffers))
        return sum(
            (own.shape[2] - self._packed // tokens) * own[:, :, :1].numel() * own.element_size() for own, tokens in rows
        )
