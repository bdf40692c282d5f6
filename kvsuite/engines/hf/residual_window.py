"""Copies of a layer's newest tokens in the model's dtype, beside the packed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_store import gather


class ResidualWindow:
    """The last ``tokens`` of a text by position, whatever a policy removes.

    Parameters
    ----------
    tokens
        Length of the window, at least 1.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._copies: tuple[Tensor, Tensor] | None = None

    def keep(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Copy new tokens ``[batch, heads, n, head_dim]``, of which the first has position ``first``."""
        if self._copies is None:
            shapes = ((*t.shape[:2], self._tokens, t.shape[3]) for t in (keys, values))
            self._copies = tuple(t.new_zeros(shape) for t, shape in zip((keys, values), shapes, strict=True))  # type: ignore[assignment]
        count = min(keys.shape[2], self._tokens)
        skipped = keys.shape[2] - count
        places = torch.arange(first + skipped, first + skipped + count, device=keys.device) % self._tokens
        assert self._copies is not None
        for own, new in zip(self._copies, (keys, values), strict=True):
            own.index_copy_(2, places, new[:, :, skipped:])

    def over(self, keys: Tensor, values: Tensor, positions: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots at ``positions`` ``[n]`` or ``[batch, heads, n]``, the last of ``seen`` tokens from here."""
        if self._copies is None:
            return keys, values
        positions = positions.to(keys.device)
        inside = (positions >= seen - self._tokens).unsqueeze(-1)
        places = positions % self._tokens
        own_keys, own_values = (gather(own, places) for own in self._copies)
        return torch.where(inside, own_keys, keys), torch.where(inside, own_values, values)

    def tensors(self) -> list[Tensor]:
        """The copies."""
        return list(self._copies or ())

    def headroom(self, seen: int) -> int:
        """Bytes that no token fills yet."""
        left = self._tokens - min(self._tokens, seen)
        return sum(left * t[:, :, :1].numel() * t.element_size() for t in self.tensors())
