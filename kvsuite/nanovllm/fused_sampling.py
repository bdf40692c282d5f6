"""Draws from whole distributions in one pass over the logits. Importing this module needs triton.

`sampling.sample` says what is drawn; its tensors of int64 take as long as a decode step of a small model. Checked by triton's
interpreter.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from .greedy_tokens import room_for_winners, settle_row

# programs that share a row, and tokens that one of them looks at together
_PARTS = 16
_TOKENS = 1024


@triton.jit
def _scramble(word):
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit(do_not_specialize=["vocabulary", "span"])
def _race_kernel(
    logits,
    rows,
    temperatures,
    keys,
    tops,
    arrivals,
    tokens,
    row_stride,
    vocabulary,
    span,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    drawn = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(rows + drawn)
    temperature = tl.load(temperatures + drawn)
    first = tl.load(keys + 2 * drawn).to(tl.uint32)
    second = tl.load(keys + 2 * drawn + 1).to(tl.uint32)
    lanes = tl.arange(0, TOKENS)
    best = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    where = tl.full((TOKENS,), 0, dtype=tl.int32)
    start = part * span
    stop = tl.minimum(start + span, vocabulary)
    for at in range(start, stop, TOKENS):
        token = at + lanes
        inside = token < stop
        score = tl.load(logits + row * row_stride + token, mask=inside, other=0.0).to(tl.float32) / temperature
        word = _scramble((token.to(tl.uint32) * 0x9E3779B1) ^ first)
        word = _scramble(word + second)
        # 1 - u keeps its digits where u is small, and small variates are the ones that win; u may round to 1
        uniform = (word.to(tl.float32) + 0.5) / 4294967296.0
        series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + uniform * 0.25)))
        variate = tl.where(uniform < 0.01, series, -tl.log(1.0 - uniform))
        score -= tl.log(tl.minimum(variate, 50.0))
        better = inside & (score > best)
        best = tl.where(better, score, best)
        where = tl.where(better, token, where)
    settle_row(best, where, tops, arrivals, tokens, drawn, part, PARTS, PARTS)


def draw(logits: Tensor, rows: Tensor, temperatures: Tensor, keys: Tensor, arrivals: Tensor | None = None) -> Tensor:
    """Draw a token for some rows.

    Parameters
    ----------
    logits
        ``[R, vocab]``, the last dimension contiguous.
    rows
        int64 ``[n]``.
    temperatures
        float32 ``[n]``, positive.
    keys
        int64 ``[n, 2]``: two words of 32 bits each.
    arrivals
        See `greedy_tokens.greedy_tokens`.

    Returns
    -------
    Tensor
        int64 ``[n]``.
    """
    count, vocabulary = rows.shape[0], logits.shape[1]
    room = room_for_winners(count, _PARTS, arrivals, logits.device)
    _race_kernel[(count, _PARTS)](
        logits,
        rows,
        temperatures,
        keys,
        *room,
        logits.stride(0),
        vocabulary,
        triton.cdiv(vocabulary, _PARTS),
        PARTS=_PARTS,
        TOKENS=_TOKENS,
        num_warps=4,
    )
    return room[-1]
