"""Where a layer's keys and values lie: preallocated slots, packed or not, or tensors rebuilt at every token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from kvsuite.engines.decoder import refuse_while_capturing

from .packed_form import PackedForm

Hole = int | Tensor | None


class Store(ABC):
    """Keys and values ``[batch, heads, n, head_dim]`` of one layer, by slot. A *hole* is the slot the next token reuses."""

    #: whether a token may take the slot of an evicted one
    reuses_slots = False

    @abstractmethod
    def load(self, keys: Tensor, values: Tensor) -> None:
        """Replace everything stored by ``keys`` and ``values``."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, slots: int, hole: Hole) -> tuple[Tensor, Tensor]:
        """Store new tokens behind the ``slots`` in use, or one token in ``hole``; return all keys and values in use."""

    @abstractmethod
    def select(self, keep: Tensor, slots: int) -> None:
        """Keep slots ``keep`` (``[k]`` or ``[batch, heads, k]``) of the first ``slots``, in that order."""

    @abstractmethod
    def view(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``slots``."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The tensors kept alive."""

    @abstractmethod
    def headroom(self, slots: int) -> int:
        """Bytes set aside beyond the first ``slots``."""


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """Pick tokens ``index`` (``[k]`` for all heads, or ``[batch, heads, k]``) of ``tensor`` ``[batch, heads, n, dim]``."""
    if index.dim() == 1:
        return tensor.index_select(2, index.to(tensor.device))
    return tensor.gather(2, index.unsqueeze(-1).expand(*index.shape, tensor.shape[-1]))


class RingStore(Store):
    """Preallocated: a new token overwrites the slot of the evicted one, so a step moves one token whatever the cache holds.

    Parameters
    ----------
    capacity
        Slots; grown by doubling if a caller stores more than announced.
    form
        How keys and values are packed, token by token; ``None`` stores them as they are.
    """

    reuses_slots = True

    def __init__(self, capacity: int, form: PackedForm | None = None) -> None:
        self._capacity = capacity
        self._form = form
        self._buffers: list[Tensor] = []

    def _reserve(self, like: Sequence[Tensor], slots: int) -> list[Tensor]:
        if not self._buffers:
            self._capacity = max(self._capacity, slots)
            self._buffers = [t.new_empty(*t.shape[:2], self._capacity, t.shape[3]) for t in like]
        elif slots > self._buffers[0].shape[2]:
            refuse_while_capturing("a cache buffer")
            self._capacity = max(2 * self._capacity, slots)
            grown = [t.new_empty(*t.shape[:2], self._capacity, t.shape[3]) for t in self._buffers]
            for new, old in zip(grown, self._buffers, strict=True):
                new[:, :, : old.shape[2]] = old
            self._buffers = grown
        return self._buffers

    def _pieces(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        return [keys, values] if self._form is None else self._form.pieces(keys, values)

    def _first(self, slots: int) -> list[Tensor]:
        if not self._buffers:
            raise RuntimeError("the layer has seen no token yet")
        return [buffer[:, :, :slots] for buffer in self._buffers]

    def _put(self, pieces: Sequence[Tensor]) -> None:
        n = pieces[0].shape[2]
        for own, new in zip(self._reserve(pieces, n), pieces, strict=True):
            own[:, :, :n] = new

    def load(self, keys: Tensor, values: Tensor) -> None:
        self._put(self._pieces(keys, values))

    def append(self, keys: Tensor, values: Tensor, slots: int, hole: Hole) -> tuple[Tensor, Tensor]:
        end = slots if hole is not None else slots + keys.shape[2]
        pieces = self._pieces(keys, values)
        for own, new in zip(self._reserve(pieces, end), pieces, strict=True):
            if hole is None:
                own[:, :, slots:end] = new
            elif isinstance(hole, int):
                own[:, :, hole] = new[:, :, 0]
            else:
                own.scatter_(2, hole[..., None, None].expand_as(new), new)
        return self.view(end)

    def select(self, keep: Tensor, slots: int) -> None:
        self._put([gather(piece, keep) for piece in self._first(slots)])

    def view(self, slots: int) -> tuple[Tensor, Tensor]:
        stored = self._first(slots)
        if self._form is not None:
            return self._form.whole(stored)
        keys, values = stored
        return keys, values

    def tensors(self) -> list[Tensor]:
        return list(self._buffers)

    def headroom(self, slots: int) -> int:
        return sum((t.shape[2] - slots) * t[:, :, :1].numel() * t.element_size() for t in self._buffers)


class CopyStore(Store):
    """Rebuilt by concatenation at every token, as the original program does: for comparison with `RingStore`."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def load(self, keys: Tensor, values: Tensor) -> None:
        # a fused projection hands out slices; keeping one would keep the whole projection alive
        self._keys, self._values = keys.contiguous(), values.contiguous()

    def append(self, keys: Tensor, values: Tensor, slots: int, hole: Hole) -> tuple[Tensor, Tensor]:
        if hole is not None:
            raise RuntimeError("a copying store has no slots to reuse")
        if self._keys is not None and self._values is not None and slots:
            keys = torch.cat([self._keys, keys], dim=2)
            values = torch.cat([self._values, values], dim=2)
        self.load(keys, values)
        return keys, values

    def select(self, keep: Tensor, slots: int) -> None:
        keys, values = self.view(slots)
        self._keys, self._values = gather(keys, keep), gather(values, keep)

    def view(self, slots: int) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            raise RuntimeError("the layer has seen no token yet")
        return self._keys, self._values

    def tensors(self) -> list[Tensor]:
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def headroom(self, slots: int) -> int:
        return 0
