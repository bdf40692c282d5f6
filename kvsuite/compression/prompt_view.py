"""What a policy sees of one layer's prompt: keys, values, and what its queries tell, gathered chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import CacheView, Needs
from .ranked import key_norms

if TYPE_CHECKING:
    from torch import Tensor

#: sums over the last queries ``[heads, q, head_dim]`` of causal weights over keys ``[kv_heads, n, head_dim]``: ``[heads, n]``
SumsOf = Callable[["Tensor", "Tensor", float], "Tensor"]
#: rotates ``[1, heads, n, head_dim]`` to positions ``[n]``, or back
Turn = Callable[["Tensor", "Tensor"], "Tensor"]
# float32 attention weights that are alive at once, in bytes
_BLOCK_BYTES = 1 << 26


class PromptObservation:
    """Gathers what `Needs` names from the queries of one layer of one prompt, in whatever chunks they come.

    Parameters
    ----------
    needs
        What the policy asks for.
    unrotate
        Takes the model's rotation off; needed for `Needs.query_statistics`.
    sums_of
        Computes `attention_sums` where the engine has something better than the weights themselves.
    """

    def __init__(self, needs: Needs, unrotate: Turn | None = None, sums_of: SumsOf | None = None) -> None:
        self.needs = needs
        self.scale = 1.0
        self.last: Tensor | None = None
        self.sums: Tensor | None = None
        self._unrotate = unrotate
        self._sums_of = sums_of or attention_sums
        self._seen = 0
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, query: Tensor, keys: Callable[[], Tensor], scale: float) -> None:
        """Take the next chunk of the prompt.

        Parameters
        ----------
        query
            Rotated, as the attention sees them, ``[heads, q, head_dim]``.
        keys
            Gives the rotated keys up to and with this chunk, ``[kv_heads, n, head_dim]``.
        scale
            Factor of the attention's products.
        """
        import torch

        self.scale = scale
        first, tokens = self._seen, query.shape[1]
        self._seen += tokens
        if self.needs.queries:
            recent = query[:, -self.needs.queries :].clone()
            self.last = recent if self.last is None else torch.cat([self.last, recent], dim=1)[:, -self.needs.queries :]
        if self.needs.attention_sums:
            found = self._sums_of(query, keys(), scale)
            if self.sums is not None:
                found[:, : self.sums.shape[1]] += self.sums
            self.sums = found
        if self.needs.query_statistics is not None:
            skipped = max(self.needs.query_statistics - first, 0)
            if skipped < tokens:
                self._add_statistics(query[:, skipped:], first + skipped)

    def numbers_of_token(self, *, weights: bool) -> int:
        """About how many float32 numbers a policy computes for each stored token from what was gathered.

        ``weights`` says whether attention weights of the last queries are written.
        """
        found = self.last.shape[0] * self.last.shape[1] if weights and self.last is not None else 0
        # a copy of its key, and a product with it, for each query head
        return found if self._mean is None else found + 2 * self._mean.numel()

    @classmethod
    def side_by_side(cls, layers: Sequence[PromptObservation]) -> PromptObservation:
        """What was gathered in several layers, their heads one after the other."""
        import torch

        if len(layers) == 1:
            return layers[0]
        first = layers[0]
        found = cls(first.needs, first._unrotate)
        found.scale, found._seen, found._count = first.scale, first._seen, first._count
        for name in ("last", "sums", "_mean", "_scatter"):
            if getattr(first, name) is not None:
                setattr(found, name, torch.cat([getattr(layer, name) for layer in layers]))
        return found

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean ``[heads, head_dim]`` and covariance ``[heads, head_dim, head_dim]`` of the queries before rotation."""
        if self._mean is None or self._scatter is None:
            raise RuntimeError("no query was counted: ask for query_statistics, and give more tokens than are left out")
        return self._mean, self._scatter / self._count

    def _add_statistics(self, query: Tensor, first: int) -> None:
        # chunks are merged exactly: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
        # sample variances" (1979)
        import torch

        assert self._unrotate is not None
        places = torch.arange(first, first + query.shape[1], device=query.device)
        plain = self._unrotate(query[None], places)[0].float()
        count, mean = plain.shape[1], plain.mean(dim=1)
        centred = plain - mean[:, None]
        scatter = centred.transpose(1, 2) @ centred
        if self._mean is None or self._scatter is None:
            self._count, self._mean, self._scatter = count, mean, scatter
            return
        total, apart = self._count + count, mean - self._mean
        self._scatter += scatter + (self._count * count / total) * apart[:, :, None] * apart[:, None, :]
        self._mean += apart * (count / total)
        self._count = total


@dataclass(frozen=True, kw_only=True)
class PromptView(CacheView):
    """One layer of a complete prompt, whose tokens lie in time order.

    Parameters
    ----------
    keys, values
        ``[kv_heads, n, head_dim]``; keys are rotated as the attention sees them.
    observed
        What the queries told.
    layers
        Layers of the model.
    rotate
        Rotates to any positions; for policies that ask for `Needs.query_statistics`.
    """

    keys: Tensor
    values: Tensor
    observed: PromptObservation
    layers: int = 1
    rotate: Turn | None = None

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return int(self.keys.shape[0])

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.keys.shape[-1])

    def queries(self, last: int) -> Tensor:
        """The prompt's last rotated queries, ``[heads, last, head_dim]``; fewer where the prompt is shorter."""
        if self.observed.last is None or last > self.observed.needs.queries:
            raise RuntimeError(f"{last} queries were not asked for: say so in the policy's `needs`")
        return self.observed.last[:, -last:]

    def attention(self, last: int) -> Tensor:
        """Causal attention weights of the last queries, float32 ``[heads, last, n]``."""
        query = self.queries(last)
        return attention_weights(query, self.keys, self.observed.scale, self.length - query.shape[1])

    def mean_attention(self, last: int) -> Tensor:
        """Mean of `attention` over the last queries, float32 ``[heads, n]``."""
        return self.attention(last).mean(dim=1)

    def key_norms(self) -> Tensor:
        """L2 norm of every key, float32 ``[kv_heads, n]``."""
        return key_norms(self.keys)

    def attention_sums(self) -> Tensor:
        """Attention that every token got from all queries of the prompt, float32 ``[heads, n]``.

        All chunks of the prompt are in it, and no decode step: a policy that acts at the end of the prompt has seen none.
        """
        if self.observed.sums is None:
            raise RuntimeError("attention sums were not asked for: say so in the policy's `needs`")
        return self.observed.sums

    def query_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean ``[heads, head_dim]`` and covariance ``[heads, head_dim, head_dim]`` of the queries before rotation."""
        return self.observed.statistics()

    def mean_rotation(self, first: int, count: int) -> Tensor:
        """The model's rotation, averaged over positions ``first .. first + count - 1``: float32 ``[head_dim, head_dim]``."""
        import torch

        assert self.rotate is not None
        if first + count > self.length + self.observed.needs.beyond:
            raise RuntimeError(
                f"position {first + count - 1} was not asked for: say so in `beyond` of the policy's `needs`"
            )
        width, device = self.head_dim, self.keys.device
        units = torch.eye(width, device=device)[None, :, None].expand(1, width, count, width)
        return self.rotate(units, torch.arange(first, first + count, device=device))[0].mean(dim=1).T

    def per_kv_head(self, values: Tensor) -> Tensor:
        """Mean over the query heads that share a key head: ``[heads, ...]`` to ``[kv_heads, ...]``."""
        kv_heads = self.kv_heads
        return values.reshape(kv_heads, values.shape[0] // kv_heads, *values.shape[1:]).mean(dim=1)


def attention_weights(query: Tensor, keys: Tensor, scale: float, first: int) -> Tensor:
    """Causal softmax weights in float32, ``[heads, q, n]``.

    Parameters
    ----------
    query
        ``[heads, q, head_dim]``, the first of them at position ``first``.
    keys
        ``[kv_heads, n, head_dim]`` of positions ``0 .. n - 1``; a group of query heads shares a key head.
    scale
        Factor of the products.
    first
        Position of the first query.
    """
    import torch

    heads, tokens, width = query.shape
    # the heads of a group lie side by side, so they are rows of one product
    grouped = query.reshape(keys.shape[0], -1, width)
    if query.device.type == "cuda" and query.dtype == keys.dtype in (torch.bfloat16, torch.float16):
        # products of two half-precision numbers are exact in float32, where they are added up
        products = torch.bmm(grouped, keys.transpose(1, 2), out_dtype=torch.float32)
    else:
        products = grouped.float() @ keys.float().transpose(1, 2)
    products = products.mul_(scale).view(heads, tokens, keys.shape[1])
    # all of them see what lies before the first
    at = torch.arange(keys.shape[1] - first, device=query.device)
    products[..., first:].masked_fill_(at > at[:tokens, None], float("-inf"))
    return products.softmax(dim=-1)


def attention_sums(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Sums over the queries of `attention_weights`, float32 ``[heads, n]``, for the last queries of ``n`` tokens."""
    import torch

    heads, tokens, _ = query.shape
    length = keys.shape[1]
    found = query.new_zeros(heads, length, dtype=torch.float32)
    rows = max(1, _BLOCK_BYTES // (4 * heads * length))
    for at in range(0, tokens, rows):
        # none of these sees a later key
        end = length - tokens + min(at + rows, tokens)
        weights = attention_weights(query[:, at : at + rows], keys[:, :end], scale, length - tokens + at)
        found[:, :end] += weights.sum(dim=1)
    return found
