"""Attention that every token got from the queries of a prompt, without their weights in memory. Importing this needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

_LOG2_E = 1.4426950408889634
# queries that a program of the first kernel looks at together, and tokens that it looks at at a time; in the second kernel a
# program has the tokens
_QUERIES = 64
_TOKENS = 64


# neither the length of a prompt nor that of its chunks must cost a compilation
@triton.jit(do_not_specialize=["queries", "length"])
def _shifts_kernel(
    query,
    keys,
    out,
    queries,
    length,
    scale,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    # those that see most tokens begin first
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    first = length - queries
    number = part * QUERIES + tl.arange(0, QUERIES)
    lanes = tl.arange(0, HEAD_DIM)
    inside = tl.arange(0, TOKENS)
    own = tl.load(
        query + (head * queries + number)[:, None] * HEAD_DIM + lanes[None, :],
        mask=(number < queries)[:, None],
        other=0.0,
    )
    base = keys + (head // GROUP) * length * HEAD_DIM
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    for at in range(0, tl.minimum(first + (part + 1) * QUERIES, length), TOKENS):
        tokens = at + inside
        key = tl.load(base + tokens[:, None] * HEAD_DIM + lanes[None, :], mask=(tokens < length)[:, None], other=0.0)
        scores = tl.dot(own, tl.trans(key), input_precision="ieee")
        scores = tl.where(tokens[None, :] <= first + number[:, None], scores, float("-inf"))
        # every query sees the first token, so that this is a number from the first turn on
        higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores * scale - higher[:, None]), axis=1)
        top = higher
    tl.store(out + head * queries + number, top + tl.log2(total), mask=number < queries)


@triton.jit(do_not_specialize=["queries", "length"])
def _sums_kernel(
    query,
    keys,
    shifts,
    out,
    queries,
    length,
    scale,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    # the oldest are seen by most
    start = tl.program_id(1) * TOKENS
    first = length - queries
    tokens = start + tl.arange(0, TOKENS)
    lanes = tl.arange(0, HEAD_DIM)
    inside = tl.arange(0, QUERIES)
    base = keys + (head // GROUP) * length * HEAD_DIM
    key = tl.load(base + tokens[:, None] * HEAD_DIM + lanes[None, :], mask=(tokens < length)[:, None], other=0.0)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    # from the first queries on that see one of these tokens
    for at in range(tl.maximum(start - first, 0) // QUERIES * QUERIES, queries, QUERIES):
        number = at + inside
        there = number < queries
        source = query + (head * queries + number)[:, None] * HEAD_DIM + lanes[None, :]
        own = tl.load(source, mask=there[:, None], other=0.0)
        shift = tl.load(shifts + head * queries + number, mask=there, other=float("inf"))
        scores = tl.dot(key, tl.trans(own), input_precision="ieee") * scale
        scores = tl.where(tokens[:, None] <= first + number[None, :], scores, float("-inf"))
        total += tl.sum(tl.exp2(scores - shift[None, :]), axis=1)
    tl.store(out + head * length + tokens, total, mask=tokens < length)


def attention_sums(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Sums over the queries of their causal softmax weights, float32 ``[heads, n]``.

    Products are computed twice, first for what the weights of a query are divided by, and no weight is written.

    Parameters
    ----------
    query
        The last ``q`` queries of ``n`` tokens, ``[heads, q, head_dim]``.
    keys
        ``[kv_heads, n, head_dim]``, ``head_dim`` a power of two from 16 to 256; neighbours among the heads share a key head.
    scale
        Factor of the products, positive.
    """
    heads, queries, width = query.shape
    kv_heads, length, _ = keys.shape
    query, keys = query.contiguous(), keys.contiguous()
    shifts = torch.empty((heads, queries), dtype=torch.float32, device=query.device)
    out = torch.empty((heads, length), dtype=torch.float32, device=query.device)
    sizes = {"GROUP": heads // kv_heads, "QUERIES": _QUERIES, "HEAD_DIM": width, "TOKENS": _TOKENS}
    _shifts_kernel[(heads, triton.cdiv(queries, _QUERIES))](
        query, keys, shifts, queries, length, scale * _LOG2_E, **sizes, num_warps=4, num_stages=2
    )
    _sums_kernel[(heads, triton.cdiv(length, _TOKENS))](
        query, keys, shifts, out, queries, length, scale * _LOG2_E, **sizes, num_warps=4, num_stages=2
    )
    return out
