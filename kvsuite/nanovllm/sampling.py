"""Which token follows: greedy, or drawn with a seed that makes a request independent of its company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsuite.errors import UserError

from .pages import has_kernels

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingParameters:
    """How a request's tokens are chosen and when it ends.

    Parameters
    ----------
    max_new_tokens
        Output tokens at most.
    temperature
        0 takes the most probable token.
    top_k
        Draw from the ``top_k`` most probable tokens (and those as probable as the last of them); 0 from all.
    top_p
        Draw from the fewest tokens whose probabilities reach ``top_p`` together, after `top_k`.
    seed
        A request's draws depend on its seed and on how many tokens it has, and on nothing else.
    stop_token_ids
        Tokens that end the output; the one that does is its last.
    ignore_eos
        Whether to go on behind the model's own end-of-text tokens.

    Raises
    ------
    UserError
        If a value is impossible.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        # `not (x >= 0)` is true of NaN as well
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must lie in (0, 1]")

    @property
    def whole(self) -> bool:
        """Whether any token can be drawn."""
        return self.top_k == 0 and self.top_p == 1

    @cached_property
    def stream(self) -> int:
        """Where the draws of this seed begin, 64 bits: the same for all of a request's tokens."""
        return int(_mix(np.array([self.seed & _MASK], dtype=np.uint64))[0])


_Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[SamplingParameters]], Tensor]


def greedy(logits: Tensor, arrivals: Tensor | None = None) -> Tensor:
    """The most probable token of every row of ``logits`` ``[R, vocab]``, the first of equals; int64 ``[R]``.

    ``arrivals`` are for the kernel on CUDA; see `greedy_tokens.greedy_tokens`.
    """
    if not has_kernels(logits.device):
        return logits.argmax(dim=-1)
    from .greedy_tokens import greedy_tokens

    return greedy_tokens(logits, arrivals)


def sample(
    logits: Tensor,
    parameters: Sequence[SamplingParameters],
    drawn: Sequence[int],
    arrivals: Tensor | None = None,
) -> Tensor:
    """Choose the next token of every row.

    Draws are exponential races (the Gumbel-max trick): the token with the smallest ``E / p`` wins, where ``E`` is an
    exponential variate computed from the row's seed, the number of its draws so far and the token's id. So a row is
    drawn without looking at any other, and without a random state that preemption would have to save.

    Parameters
    ----------
    logits
        ``[R, vocab]``.
    parameters
        Of each row.
    drawn
        Output tokens that each row's request has already.
    arrivals
        See `greedy`.

    Returns
    -------
    Tensor
        int64 ``[R]`` on the device of ``logits``.
    """
    whole = [row for row, chosen in enumerate(parameters) if chosen.temperature > 0 and chosen.whole]
    cut = [row for row, chosen in enumerate(parameters) if chosen.temperature > 0 and not chosen.whole]
    # a maximum that nobody asks for would read all logits once more
    tokens = greedy(logits, arrivals) if len(whole) + len(cut) < len(parameters) else None
    for rows, draw in ((whole, _one_pass(logits.device, arrivals)), (cut, _draw)):
        if not rows:
            continue
        own = [parameters[row] for row in rows]
        keys = _keys([p.stream for p in own], [drawn[row] for row in rows])
        index = _sent(rows, torch.int64, logits.device)
        temperatures = _sent([p.temperature for p in own], torch.float32, logits.device)
        found = draw(logits, index, temperatures, _sent(keys, torch.int64, logits.device), own)
        if tokens is None and len(rows) == len(parameters):
            return found
        if tokens is None:
            tokens = torch.empty(len(parameters), dtype=torch.int64, device=logits.device)
        tokens[index] = found
    assert tokens is not None
    return tokens


def _sent(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a few numbers, without waiting for what the device has yet to do."""
    found = torch.as_tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def _one_pass(device: torch.device, arrivals: Tensor | None) -> _Draw:
    """How whole distributions are drawn from: by a kernel where there is one."""
    if not has_kernels(device):
        return _draw
    from .fused_sampling import draw

    return lambda logits, rows, temperatures, keys, own: draw(logits, rows, temperatures, keys, arrivals)


def _draw(
    logits: Tensor, rows: Tensor, temperatures: Tensor, keys: Tensor, parameters: Sequence[SamplingParameters]
) -> Tensor:
    scores = _truncate(logits[rows].float() / temperatures[:, None], parameters)
    return (scores - _exponential(keys, logits.shape[-1]).log()).argmax(dim=-1)


def _truncate(scores: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """Set what `top_k` and `top_p` exclude to minus infinity."""
    for row, chosen in enumerate(parameters):
        # row by row: a batched sort could round a row's sums in another way in other company
        own = scores[row]
        if 0 < chosen.top_k < own.shape[0]:
            own.masked_fill_(own < own.topk(chosen.top_k).values[-1], float("-inf"))
        if chosen.top_p < 1:
            ordered, order = own.softmax(dim=-1).sort(descending=True, stable=True)
            before = ordered.double().cumsum(dim=-1) - ordered
            own[order[before >= chosen.top_p]] = float("-inf")
    return scores


def _keys(streams: Sequence[int], drawn: Sequence[int]) -> NDArray[np.int64]:
    """Two 32-bit words for each row, int64 ``[R, 2]``, from its stream and count: SplitMix64 (Steele et al., 2014)."""
    count = np.array(drawn, dtype=np.uint64) + np.uint64(1)
    word = _mix(np.array(streams, dtype=np.uint64) + count * np.uint64(_GAMMA))
    return np.stack([word & np.uint64(0xFFFFFFFF), word >> np.uint64(32)], axis=1).astype(np.int64)


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _exponential(keys: Tensor, count: int) -> Tensor:
    """Exponential variates float32 ``[R, count]`` from int64 keys ``[R, 2]``; the same on every device."""
    word = torch.arange(count, device=keys.device)[None] * 0x9E3779B1 & 0xFFFFFFFF
    word = _scramble(word ^ keys[:, :1])
    word = _scramble((word + keys[:, 1:]) & 0xFFFFFFFF)
    # -log1p(-u) keeps its digits where u is small, and small values are the ones that win; u may round to 1
    return -torch.log1p(-(word.float() + 0.5) / 4294967296.0).clamp_min(-50.0)


def _scramble(word: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 on 32-bit words held in int64."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)
