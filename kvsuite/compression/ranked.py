"""Policies that rank tokens per head: keep those of highest priority, in time order."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from .base import CacheView, Policy, key_norm, time_order

if TYPE_CHECKING:
    from torch import Tensor


class RankedPolicy(Policy):
    """Keep the `size_after` tokens of highest `priority`; of equal ones the older stays, whatever slot it is in."""

    shared_across_heads: ClassVar[bool] = False

    @abstractmethod
    def priority(self, view: CacheView) -> Tensor:
        """Priority of every stored token, float32 ``[..., heads, n]``; infinity protects it."""

    def token_score(self, keys: Tensor) -> Tensor:
        """L2 norm of each key in float32; a rotation leaves it unchanged, so it may be taken before or after RoPE."""
        return key_norm(keys)

    def keep(self, view: CacheView) -> Tensor:
        order = time_order(view)
        ranked = self.priority(view).gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        chosen = ranked[..., : self.size_after(view.length)].sort(dim=-1).values
        return order.gather(-1, chosen)

    def victim(self, view: CacheView) -> Tensor:
        import torch

        # the general answer sorts twice; one token to evict needs only the minimum, and of equal ones the youngest goes
        priority = self.priority(view)
        lowest = priority == priority.amin(dim=-1, keepdim=True)
        return torch.where(lowest, view.positions, -1).argmax(dim=-1)
