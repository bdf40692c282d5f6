"""The largest logit of every row in one pass and one launch. Importing needs triton.

A row is cut into parts, so that few rows keep the device busy too; the program of a row's last part to end compares the parts.
Which of equal or missing numbers wins is what `torch.argmax` says: NaN is the largest, and the first of equals wins.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# tokens that a program looks at together, parts of a row at most, and programs that keep an H200 busy
_TOKENS = 1024
_PARTS = 128
_PROGRAMS = 1056


@triton.jit
def settle_row(best, where, tops, arrivals, tokens, row, part, parts, PARTS: tl.constexpr):
    """Bring a part's scores ``best`` and their tokens ``where`` in; store the row's winner if all other parts are there.

    ``tops`` int64 ``[rows, PARTS]`` is for what each of the ``parts`` found; ``arrivals`` int32 ``[rows]`` are 0 and become 0
    again.
    """
    # one number for both: by score, then the lower token; zeros of either sign are equal, and NaN is above all
    bits = tl.where(best == 0.0, 0.0, best).to(tl.int32, bitcast=True)
    order = tl.where(best != best, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    top = tl.max((order.to(tl.int64) << 32) | (0x7FFFFFFF - where).to(tl.int64), axis=0)
    tl.store(tops + row * PARTS + part, top)
    # what this program stored comes before its arrival
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == parts - 1:
        tl.store(arrivals + row, 0)
        every = tl.arange(0, PARTS)
        # not to be found in this program's L1 cache
        found = tl.load(tops + row * PARTS + every, mask=every < parts, other=-(2**63), cache_modifier=".cg")
        tl.store(tokens + row, (0x7FFFFFFF - tl.max(found, axis=0).to(tl.int32)).to(tl.int64))


def room_for_winners(
    rows: int, parts: int, arrivals: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What `settle_row` writes to: what ``parts`` of each row found, arrivals, made if not given, and tokens ``[rows]``."""
    if arrivals is None:
        arrivals = torch.zeros(rows, dtype=torch.int32, device=device)
    tops = torch.empty(rows, parts, dtype=torch.int64, device=device)
    return tops, arrivals, torch.empty(rows, dtype=torch.int64, device=device)


# how many rows there are decides how they are cut, and must not cost a compilation
@triton.jit(do_not_specialize=["blocks"])
def _greedy_kernel(
    logits, tops, arrivals, tokens, row_stride, vocabulary, blocks, PARTS: tl.constexpr, TOKENS: tl.constexpr
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    lanes = tl.arange(0, TOKENS)
    start = part * blocks * TOKENS
    stop = tl.minimum(start + blocks * TOKENS, vocabulary)
    own = logits + row.to(tl.int64) * row_stride
    # where all are -inf the first one wins
    best = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    where = start + lanes
    for at in range(start, stop, TOKENS):
        token = at + lanes
        score = tl.load(own + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
        # also where the score is NaN and the best one is not
        better = ((score > best) | (score != score)) & (best == best)
        best = tl.where(better, score, best)
        where = tl.where(better, token, where)
    settle_row(best, where, tops, arrivals, tokens, row, part, tl.num_programs(1), PARTS)


def greedy_tokens(logits: Tensor, arrivals: Tensor | None = None) -> Tensor:
    """The first of the largest logits of every row, as ``logits.argmax(dim=-1)``.

    Parameters
    ----------
    logits
        ``[R, vocab]`` of 16 or 32 bits, the last dimension contiguous.
    arrivals
        int32, one for each row at least, all 0, and 0 again at the end: how many parts of a row are done. Calls that share
        them are on one stream. Without them some are made, which is one more launch.

    Returns
    -------
    Tensor
        int64 ``[R]``.
    """
    rows, vocabulary = logits.shape
    every = triton.cdiv(vocabulary, _TOKENS)
    blocks = triton.cdiv(every, min(every, _PARTS, max(1, _PROGRAMS // rows)))
    room = room_for_winners(rows, _PARTS, arrivals, logits.device)
    _greedy_kernel[(rows, triton.cdiv(every, blocks))](
        logits,
        *room,
        logits.stride(0),
        vocabulary,
        blocks,
        PARTS=_PARTS,
        TOKENS=_TOKENS,
        num_warps=4,
    )
    return room[-1]
