"""Where a layer's keys and values lie: a preallocated buffer with reused slots, or tensors rebuilt by concatenation."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvsuite.engines.decoder import refuse_while_capturing

Hole = int | Tensor | None


class Store(ABC):
    """Keys and values ``[batch, heads, n, head_dim]`` of one layer, by slot. A *hole* is the slot the next token reuses."""

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
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def _reserve(self, keys: Tensor, values: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            self._capacity = max(self._capacity, slots)
            self._keys, self._values = (t.new_empty(*t.shape[:2], self._capacity, t.shape[3]) for t in (keys, values))
        elif slots > self._keys.shape[2]:
            refuse_while_capturing("a cache buffer")
            self._capacity = max(2 * self._capacity, slots)
            grown = [t.new_empty(*t.shape[:2], self._capacity, t.shape[3]) for t in (self._keys, self._values)]
            for new, old in zip(grown, (self._keys, self._values), strict=True):
                new[:, :, : old.shape[2]] = old
            self._keys, self._values = grown
        return self._keys, self._values

    def load(self, keys: Tensor, values: Tensor) -> None:
        n = keys.shape[2]
        own_keys, own_values = self._reserve(keys, values, n)
        own_keys[:, :, :n], own_values[:, :, :n] = keys, values

    def append(self, keys: Tensor, values: Tensor, slots: int, hole: Hole) -> tuple[Tensor, Tensor]:
        end = slots if hole is not None else slots + keys.shape[2]
        own_keys, own_values = self._reserve(keys, values, end)
        if hole is None:
            own_keys[:, :, slots:end], own_values[:, :, slots:end] = keys, values
        elif isinstance(hole, int):
            own_keys[:, :, hole], own_values[:, :, hole] = keys[:, :, 0], values[:, :, 0]
        else:
            for own, new in ((own_keys, keys), (own_values, values)):
                own.scatter_(2, hole[..., None, None].expand_as(new), new)
        return own_keys[:, :, :end], own_values[:, :, :end]

    def select(self, keep: Tensor, slots: int) -> None:
        keys, values = self.view(slots)
        self.load(gather(keys, keep), gather(values, keep))

    def view(self, slots: int) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            raise RuntimeError("the layer has seen no token yet")
        return self._keys[:, :, :slots], self._values[:, :, :slots]

    def tensors(self) -> list[Tensor]:
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def headroom(self, slots: int) -> int:
        return sum((t.shape[2] - slots) * t[:, :, :1].numel() * t.element_size() for t in self.tensors())


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
