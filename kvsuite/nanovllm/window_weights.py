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
# measured on an H200: two or four query heads a program that share their keys, or more tokens at a time, are slower
_TOKENS = 64
_WARPS = 4
_STAGES = 3


@triton.jit
def _load_keys(base, slots, tokens, length, token_stride, lanes, PAGED: tl.constexpr, MASKED: tl.constexpr):
    """Keys ``[TOKENS, HEAD_DIM]`` of some tokens of one head."""
    place = tokens
    if PAGED:
        place = tl.load(slots + tokens, mask=tokens < length, other=0) if MASKED else tl.load(slots + tokens)
    source = base + place[:, None] * token_stride + lanes[None, :]
    if MASKED:
        return tl.load(source, mask=(tokens < length)[:, None], other=0.0)
    return tl.load(source)


# neither the length of a prompt, nor the number of its last queries, nor the size of a pool must cost a compilation
@triton.jit(do_not_specialize=["window", "length", "layer_slots"])
def _mean_weights_kernel(
    query,
    keys,
    slots,
    out,
    window,
    length,
    scale,
    layer_slots,
    head_stride,
    token_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGED: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    number = part * QUERIES + tl.arange(0, QUERIES)
    lanes = tl.arange(0, HEAD_DIM)
    inside = tl.arange(0, TOKENS)
    own = tl.load(
        query + (head * window + number)[:, None] * HEAD_DIM + lanes[None, :],
        mask=(number < window)[:, None],
        other=0.0,
    )
    kv_head = head // GROUP
    base = keys + (kv_head // KV_HEADS) * layer_slots * token_stride + (kv_head % KV_HEADS) * head_stride
    # the last token that a query sees; rows that are none see all
    last = tl.minimum(length - window + number, length - 1)
    # every query sees all tokens before this one
    whole = (length - window) // TOKENS * TOKENS
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    for at in range(0, whole, TOKENS):
        key = _load_keys(base, slots, at + inside, length, token_stride, lanes, PAGED, False)
        scores = tl.dot(own, tl.trans(key), input_precision="ieee")
        higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores * scale - higher[:, None]), axis=1)
        top = higher
    for at in range(whole, length, TOKENS):
        tokens = at + inside
        key = _load_keys(base, slots, tokens, length, token_stride, lanes, PAGED, True)
        scores = tl.dot(own, tl.trans(key), input_precision="ieee")
        scores = tl.where(tokens[None, :] <= last[:, None], scores, float("-inf"))
        # every query sees the first token, so that this is a number from the first turn on
        higher = tl.maximum(top, tl.max(scores, axis=1) * scale)
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores * scale - higher[:, None]), axis=1)
        top = higher
    # what a weight is divided by, in the exponent
    shift = tl.where(number < window, top + tl.log2(total * window), float("inf"))
    asked = tl.trans(own)
    place = out + (head * tl.num_programs(1) + part) * length
    # tokens lie in rows here: what is added up is what a thread has
    for at in range(0, whole, TOKENS):
        tokens = at + inside
        key = _load_keys(base, slots, tokens, length, token_stride, lanes, PAGED, False)
        weights = tl.exp2(tl.dot(key, asked, input_precision="ieee") * scale - shift[None, :])
        tl.store(place + tokens, tl.sum(weights, axis=1))
    for at in range(whole, length, TOKENS):
        tokens = at + inside
        key = _load_keys(base, slots, tokens, length, token_stride, lanes, PAGED, True)
        scores = tl.dot(key, asked, input_precision="ieee") * scale
        weights = tl.exp2(tl.where(tokens[:, None] <= last[None, :], scores, float("-inf")) - shift[None, :])
        tl.store(place + tokens, tl.sum(weights, axis=1), mask=tokens < length)


def mean_weights(query: Tensor, keys: Tensor, scale: float, slots: Tensor | None = None) -> Tensor:
    """Mean over the queries of their causal softmax weights, float32 ``[heads, n]``.

    Keys are read twice, and the products computed twice, in the place of ``heads * w * n`` weights written and read.

    Parameters
    ----------
    query
        The last ``w`` queries of ``n`` tokens, ``[heads, w, head_dim]``.
    keys
        ``[kv_heads, n, head_dim]``, ``head_dim`` a power of two from 16 to 256; neighbours among the heads share a key head.
        With ``slots``: the pages of some layers, ``[layers, num_blocks, block_size, kv_heads, head_dim]``, contiguous, and
        the heads of the queries are those of all layers one after the other.
    scale
        Factor of the products, positive.
    slots
        ``block * block_size + offset`` of the tokens in the pages, int64 ``[n]``, contiguous.
    """
    heads, window, width = query.shape
    if slots is None:
        # as of layers of one key head each, so that their number costs no compilation
        keys = keys.contiguous()
        layers, length, _ = keys.shape
        kv_heads, strides = 1, (length, width, width)
    else:
        layers, blocks, block_size, kv_heads, _ = keys.shape
        length, strides = slots.shape[0], (blocks * block_size, width, kv_heads * width)
    group = heads // (layers * kv_heads)
    queries = min(_MOST_QUERIES, max(_FEWEST_QUERIES, triton.next_power_of_2(window)))
    parts = triton.cdiv(window, queries)
    out = torch.empty((heads, parts, length), dtype=torch.float32, device=query.device)
    _mean_weights_kernel[(heads, parts)](
        query.contiguous(), keys, slots, out, window, length, scale * _LOG2_E, *strides,
        KV_HEADS=kv_heads, GROUP=group, QUERIES=queries, HEAD_DIM=width, TOKENS=_TOKENS,
        PAGED=slots is not None, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    return out[:, 0] if parts == 1 else out.sum(dim=1)
