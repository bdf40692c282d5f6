"""Policies that rank tokens per head: keep those of highest priority, in time order."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from .base import CacheView, time_order
from .by_factor import ByFactor

if TYPE_CHECKING:
    from torch import Tensor


#: float32 sums in another order, or keys at another rotation, differ by less; scores that differ otherwise by more
ROUNDING = 1e-6


def ranked(priority: Tensor) -> Tensor:
    """Indices from the highest priority to the lowest; equal ones stay in the order in which they are given.

    Tokens that occur twice have equal keys before rotation in the first layer, and some models give all keys one norm: there
    rounding would decide, on every engine in another way. Neighbours in rank that are nearer than rounding, relative to
    their size, are therefore equal.

    Parameters
    ----------
    priority
        Float32 ``[..., n]`` in time order.

    Returns
    -------
    Tensor
        int64, shaped like ``priority``.
    """
    return _ranks(priority)[0].argsort(dim=-1, stable=True)


def highest(priority: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest priorities in time order: the first of `ranked`, sorted, by a single sort.

    Parameters
    ----------
    priority
        Float32 ``[..., n]`` in time order.
    count
        At least 1, at most n.

    Returns
    -------
    Tensor
        int64 ``[..., count]``.
    """
    import torch

    rank, sorted_ranks = _ranks(priority)
    # of those that are equal to the last one that stays, the older stay
    last = sorted_ranks[..., count - 1 : count]
    sure, equal = rank < last, rank == last
    stays = sure | (equal & (equal.cumsum(dim=-1) <= count - sure.sum(dim=-1, keepdim=True)))
    # what goes is written behind the others
    place = torch.where(stays, stays.cumsum(dim=-1) - 1, count)
    index = torch.arange(priority.shape[-1], device=priority.device).expand(priority.shape)
    return index.new_empty(*priority.shape[:-1], count + 1).scatter_(-1, place, index)[..., :count]


def key_norms(keys: Tensor) -> Tensor:
    """L2 norm of each key ``[..., head_dim]`` in float32; a rotation leaves it unchanged."""
    import torch

    found: Tensor = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    return found


def _ranks(priority: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each priority, equal ones alike, in time order and in theirs."""
    import torch

    value, order = priority.sort(dim=-1, descending=True, stable=True)
    higher, lower = value[..., :-1], value[..., 1:]
    # two infinities differ by NaN, which is no step
    steps = (higher - lower > lower.abs() * ROUNDING).long().cumsum(dim=-1)
    steps = torch.nn.functional.pad(steps, (1, 0))
    return torch.zeros_like(order).scatter(-1, order, steps), steps


class NormRule(NamedTuple):
    """A priority that is ``sign`` times the norm of a key, and infinite for the ``protected`` youngest positions."""

    sign: int
    protected: int


class RankedPolicy(ByFactor):
    """Keep the `size_after` tokens of highest `priority`; of equal ones the older stays, whatever slot it is in."""

    shared_across_heads: ClassVar[bool] = False

    @abstractmethod
    def priority(self, view: CacheView) -> Tensor:
        """Priority of every stored token, float32 ``[..., heads, n]``; infinity protects it."""

    def norm_rule(self, length: int) -> NormRule | None:
        """What `priority` of ``length`` stored tokens is, if norms and positions are all that it looks at.

        An engine may then find the token to evict without it. Whoever overrides `priority` overrides this as well.
        """
        return None

    def token_score(self, keys: Tensor) -> Tensor:
        """L2 norm of each key in float32; a rotation leaves it unchanged, so it may be taken before or after RoPE."""
        return key_norms(keys)

    def keep(self, view: CacheView) -> Tensor:
        order = time_order(view)
        return order.gather(-1, highest(self.priority(view).gather(-1, order), self.size_after(view.length)))

    def victim(self, view: CacheView) -> Tensor:
        import torch

        # the general answer sorts twice; one token to evict needs only the minimum, and of equal ones the youngest goes
        priority = self.priority(view)
        least = priority.amin(dim=-1, keepdim=True)
        lowest = priority - least <= least.abs() * ROUNDING
        return torch.where(lowest, view.positions, -1).argmax(dim=-1)
