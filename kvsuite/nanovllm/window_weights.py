"""Mean attention of a prompt's last queries, without their weights in memory. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

_LOG2_E = 1.4426950408889634
# queries that a program looks at together; the tensor cores' smallest side
_MOST_QUERIES = 64
_FEWEST_QUERIES = 16
_TOKENS = 128


# neither the length of a prompt nor the number of its last queries must cost a compilation
@triton.jit(do_not_specialize=["window", "length"])
def _mean_weights_kernel(
    query,
    keys,
    out,
    window,
    length,
    scale,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    rows = part * QUERIES + tl.arange(0, QUERIES)
    lanes = tl.arange(0, HEAD_DIM)
    inside = tl.arange(0, TOKENS)
    own = tl.load(
        query + (head * window + rows)[:, None] * HEAD_DIM + lanes[None, :], mask=(rows < window)[:, None], other=0.0
    )
    base = keys + (head // GROUP) * length * HEAD_DIM
    # the last token that a query sees; rows that are none see all
    last = tl.minimum(length - window + rows, length - 1)
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    for at in range(0, length, TOKENS):
        tokens = at + inside
        key = tl.load(base + tokens[None, :] * HEAD_DIM + lanes[:, None], mask=(tokens < length)[None, :], other=0.0)
        scores = tl.dot(own, key, input_precision="ieee") * scale
        scores = tl.where(tokens[None, :] <= last[:, None], scores, float("-inf"))
        # every query sees the first token, so that this is a number from the first turn on
        higher = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), axis=1)
        top = higher
    share = tl.where(rows < window, 1.0 / (total * window), 0.0)
    place = out + (head * tl.num_programs(1) + part) * length
    for at in range(0, length, TOKENS):
        tokens = at + inside
        key = tl.load(base + tokens[None, :] * HEAD_DIM + lanes[:, None], mask=(tokens < length)[None, :], other=0.0)
        scores = tl.dot(own, key, input_precision="ieee") * scale
        scores = tl.where(tokens[None, :] <= last[:, None], scores, float("-inf"))
        weights = tl.exp2(scores - top[:, None]) * share[:, None]
        tl.store(place + tokens, tl.sum(weights, axis=0), mask=tokens < length)


def mean_weights(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Mean over the queries of their causal softmax weights, float32 ``[heads, n]``.

    Keys are read twice, and the products computed twice, in the place of ``heads * w * n`` weights written and read.

    Parameters
    ----------
    query
        The last ``w`` queries of ``n`` tokens, ``[heads, w, head_dim]``.
    keys
        ``[kv_heads, n, head_dim]``, ``head_dim`` a power of two from 16 to 256; neighbours among the heads share a key head.
    scale
        Factor of the products.
    """
    heads, window, width = query.shape
    kv_heads, length, _ = keys.shape
    queries = min(_MOST_QUERIES, max(_FEWEST_QUERIES, triton.next_power_of_2(window)))
    parts = triton.cdiv(window, queries)
    out = torch.empty((heads, parts, length), dtype=torch.float32, device=query.device)
    _mean_weights_kernel[(heads, parts)](
        query.contiguous(), keys.contiguous(), out, window, length, scale * _LOG2_E,
        GROUP=heads // kv_heads, QUERIES=queries, HEAD_DIM=width, TOKENS=_TOKENS, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out[:, 0] if parts == 1 else out.sum(dim=1)
