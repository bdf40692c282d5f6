"""A complete prompt in a pool, as a policy that looks at it sees it: nothing is copied that is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvsuite.compression.prompt_view import PromptView, SumsOf

from .kv_pool import KVPool
from .pages import has_kernels


@dataclass(frozen=True, kw_only=True)
class PooledPrompt(PromptView):
    """Some layers of one layer group, their heads one after the other.

    Keys and values are copied from the pool when a policy asks for them. Norms of keys, and the mean attention of the last
    queries, are computed where the keys lie, by kernels on CUDA.

    Parameters
    ----------
    pool
        Keys and values of the layer group.
    slots
        Of the tokens, int64 ``[n]``.
    part
        The layers among the group's.
    turn
        Rotates keys ``[1, heads, n, head_dim]`` to positions ``[n]``, where the pool has them unrotated.
    """

    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    pool: KVPool
    slots: Tensor
    part: slice
    turn: Callable[[Tensor, Tensor], Tensor] | None = None

    def __getattr__(self, name: str) -> Tensor:
        if name == "values":
            found = self.pool.values_of(self.slots, self.part).flatten(0, 1)
        elif name == "keys":
            found = self.pool.keys_of(self.slots, self.part).flatten(0, 1)
            if self.turn is not None:
                found = self.turn(found[None], torch.arange(self.length, device=found.device))[0]
        else:
            raise AttributeError(name)
        object.__setattr__(self, name, found)
        return found

    @property
    def kv_heads(self) -> int:
        return int(self.positions.shape[0])

    def mean_attention(self, last: int) -> Tensor:
        if not has_weight_kernels(self.pool):
            return super().mean_attention(last)
        from .window_weights import mean_weights

        query, scale = self.queries(last), self.observed.scale
        if self.turn is not None or self.pool.is_packed:
            return mean_weights(query, self.keys, scale)
        return mean_weights(query, self.pool.keys[self.part], scale, self.slots)

    def key_norms(self) -> Tensor:
        found = paged_norms(self.pool, self.slots, self.part)
        return super().key_norms() if found is None else found.flatten(0, 1)


def attention_sums_of(pool: KVPool) -> SumsOf | None:
    """The kernel that adds up the attention of a prompt's queries; ``None`` where the exact reference does."""
    if not has_weight_kernels(pool):
        return None
    from .attention_sums import attention_sums

    return attention_sums


def has_weight_kernels(pool: KVPool) -> bool:
    """Whether kernels compute what a prompt's queries attend to; elsewhere it is the exact reference."""
    halves = pool.dtype in (torch.bfloat16, torch.float16)
    return has_kernels(pool.device) and halves and pool.group.head_dim in (16, 32, 64, 128, 256)


def paged_norms(pool: KVPool, slots: Tensor, part: slice) -> Tensor | None:
    """L2 norm of the keys in some slots, float32 ``[layers, kv_heads, n]``; ``None`` where no kernel reads them there."""
    if not has_kernels(pool.device) or pool.is_packed:
        return None
    from .paged_norms import paged_key_norms

    return paged_key_norms(pool.keys[part], slots)
