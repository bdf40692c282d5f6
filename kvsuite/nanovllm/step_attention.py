"""Attention of a decode step from the product for queries, keys and values on, in one kernel. Importing needs triton.

Norms of heads, rotation, storing the new token and merging the parts of cut keys are steps of the kernel that attends
(`split_attention`), since a step of few tokens takes as long as it has kernels: every boundary costs some 3 us.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.language.extra.cuda import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from .fused_kernels import launch_options, sum_of_parts
from .split_attention import (
    LOG2_E,
    attend_part,
    key_options,
    merge_splits,
    part_of,
    room_for_parts,
    sequence_of,
    store_part,
)

#: parts up to which the program that ends last merges them; more are merged by a program for each head
MOST_MERGED = 32
#: keys of a step
STEP_KEYS = 64


class Heads(NamedTuple):
    """What becomes of the heads of a product before they attend.

    Parameters
    ----------
    query_heads
        Heads of the queries, which come first in the product.
    norms
        Weights ``[head_dim]`` of the RMS norms of a query's and a key's head; ``None`` for models without.
    eps
        Of these norms.
    table
        Cosines and sines of the rotation, each ``[positions, head_dim / 2]``.
    """

    query_heads: int
    norms: tuple[Tensor, Tensor] | None
    eps: float
    table: tuple[Tensor, Tensor]


@triton.jit
def _turned(
    vectors,
    first,
    present,
    factor,
    part_stride,
    weight,
    eps,
    cosine,
    sine,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    NORM: tl.constexpr,
    dtype: tl.constexpr,
):
    """Head vectors that begin at ``first`` ``[heads, 1]``, normed and rotated as transformers rounds them."""
    lanes = tl.arange(0, HEAD_DIM)[None, :]
    # the number that a lane is rotated with
    partners = (lanes + HEAD_DIM // 2) % HEAD_DIM
    own = sum_of_parts(vectors, first + lanes, present, part_stride, PARTS, dtype, factor)
    other = sum_of_parts(vectors, first + partners, present, part_stride, PARTS, dtype, factor)
    if NORM:
        norm = tl.rsqrt(tl.sum(own * own, axis=1) / HEAD_DIM + eps)[:, None]
        own = ((own * norm).to(dtype).to(tl.float32) * tl.load(weight + lanes).to(tl.float32)).to(dtype).to(tl.float32)
        other = (other * norm).to(dtype).to(tl.float32) * tl.load(weight + partners).to(tl.float32)
        other = other.to(dtype).to(tl.float32)
    return ((own * cosine).to(dtype).to(tl.float32) + (other * sine).to(dtype).to(tl.float32)).to(dtype)


# neither a batch size nor tables of any width must cost a compilation
@triton.jit(do_not_specialize=["rows", "table_stride"])
def _step_kernel(
    qkv,
    squares,
    positions,
    slots,
    cosines,
    sines,
    query_weight,
    key_weight,
    keys,
    values,
    tables,
    lengths,
    dropped,
    order,
    mixed,
    maxima,
    sums,
    arrivals,
    out,
    rows,
    eps,
    scale,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ABOVE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_ABOVE: tl.constexpr,
    NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD: tl.constexpr,
    MERGED: tl.constexpr,
    ORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    # heads lie side by side in a page
    head = tl.program_id(0)
    sequence = sequence_of(order, ORDERED)
    split = tl.program_id(2)
    dtype = out.dtype.element_ty
    half: tl.constexpr = HEAD_DIM // 2
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    lanes = tl.arange(0, HEAD_DIM)[None, :]
    members = tl.arange(0, QUERIES)
    # the new token is none of those that are cut
    older = tl.load(lengths + sequence) - 1
    start, stop = part_of(older, split, SPLITS, TOKENS)
    angles = tl.load(positions + sequence) * half + lanes % half
    cosine = tl.load(cosines + angles).to(tl.float32)
    sine = tl.load(sines + angles).to(tl.float32)
    sine = tl.where(lanes < half, -sine, sine)
    slot = tl.load(slots + sequence)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tiles = tl.arange(0, TILES_ABOVE)
    factor = tl.rsqrt(tl.sum(tl.load(squares + tiles * rows + sequence, mask=tiles < TILES, other=0.0), axis=0) + eps)
    vectors = qkv + sequence * width
    part_stride = rows.to(tl.int64) * width
    first = (head * GROUP + members)[:, None] * HEAD_DIM
    here = (members < GROUP)[:, None]
    own = _turned(
        vectors, first, here, factor, part_stride, query_weight, eps, cosine, sine, HEAD_DIM, PARTS, NORM, dtype
    )  # fmt: skip
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    acc = tl.zeros((QUERIES, HEAD_DIM), dtype=tl.float32)
    if split == SPLITS - 1:
        # the new token: seen from here, and stored for later steps
        fresh = (GROUP * KV_HEADS + head + tl.zeros((1, 1), tl.int32)) * HEAD_DIM
        true = fresh >= 0
        key = _turned(
            vectors, fresh, true, factor, part_stride, key_weight, eps, cosine, sine, HEAD_DIM, PARTS, NORM, dtype
        )  # fmt: skip
        value = sum_of_parts(vectors, fresh + KV_HEADS * HEAD_DIM + lanes, true, part_stride, PARTS, dtype, factor)
        place = (slot * KV_HEADS + head) * HEAD_DIM + lanes
        tl.store(keys + place, key)
        tl.store(values + place, value.to(dtype))
        top = tl.sum(own.to(tl.float32) * key.to(tl.float32), axis=1) * scale
        total += 1.0
        acc += value
    top, total, acc = attend_part(
        own, top, total, acc, start, stop, sequence, head, keys, values, tables, lengths, dropped, scale, table_stride,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, TOKENS, WINDOW, SINKS, HEAD,
    )  # fmt: skip
    heads = (sequence * KV_HEADS + head) * GROUP + members
    if SPLITS == 1:
        tl.store(out + heads[:, None] * HEAD_DIM + lanes, (acc / total[:, None]).to(dtype), mask=here)
    else:
        store_part(mixed, maxima, sums, heads * SPLITS + split, acc, top, total, members < GROUP, HEAD_DIM)
        if MERGED:
            # what all threads of this program stored comes before its arrival
            tl.debug_barrier()
            arrival = arrivals + sequence * KV_HEADS + head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(arrival, 0)
                _merge(mixed, maxima, sums, out, (sequence * KV_HEADS + head) * GROUP, GROUP, ABOVE, HEAD_DIM, SPLITS)


@triton.jit
def _merge(
    mixed,
    maxima,
    sums,
    out,
    first,
    GROUP: tl.constexpr,
    ABOVE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Attention of a group's heads from its parts, which other programs stored: not to be found in this one's L1 cache."""
    some: tl.constexpr = SPLITS if SPLITS < 8 else 8
    lanes = tl.arange(0, HEAD_DIM)
    members = tl.arange(0, ABOVE)
    own = (first + members).to(tl.int64)[:, None] * SPLITS
    present = (members < GROUP)[:, None]
    tops = tl.load(maxima + own + tl.arange(0, SPLITS)[None, :], mask=present, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, axis=1)[:, None]
    total = tl.zeros((ABOVE,), dtype=tl.float32)
    acc = tl.zeros((ABOVE, HEAD_DIM), dtype=tl.float32)
    for at in tl.static_range(0, SPLITS, some):
        parts = own + at + tl.arange(0, some)[None, :]
        # a part that sees no token has -inf and weighs nothing; the query's own is always seen
        weights = tl.exp2(tl.load(maxima + parts, mask=present, other=0.0, cache_modifier=".cg") - top)
        total += tl.sum(weights * tl.load(sums + parts, mask=present, other=1.0, cache_modifier=".cg"), axis=1)
        shares = mixed + parts[:, :, None] * HEAD_DIM + lanes[None, None, :]
        acc += tl.sum(
            weights[:, :, None] * tl.load(shares, mask=present[:, :, None], other=0.0, cache_modifier=".cg"), axis=1
        )
    target = out + (first + members)[:, None] * HEAD_DIM + lanes[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=present)


def step_attention(
    qkv: Tensor,
    squares: Tensor,
    positions: Tensor,
    slots: Tensor,
    heads: Heads,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    arrivals: Tensor,
    *,
    splits: int,
    dropped: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    order: Tensor | None = None,
    tokens: int = STEP_KEYS,
    warps: int = 4,
    stages: int = 3,
    pdl: bool = False,
) -> Tensor:
    """Store the new token of every sequence and return its attention, ``[S, heads, head_dim]``.

    Parameters
    ----------
    qkv
        Partial sums ``[parts, S, (heads + 2 kv_heads) * head_dim]``.
    squares
        float32 ``[tiles, S]``, what `row_linear.add_linear` returned beside the product's input: heads are those of the
        product over the root of their sum.
    positions, slots
        int64 ``[S]``: where the new tokens stand, and where they go.
    heads
        What becomes of their heads before.
    keys, values
        ``[num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    lengths
        int32 ``[S]``, with the new token.
    arrivals
        int32, one for each sequence and key head at least, all 0, and 0 again at the end: how many parts are done. The
        program of the last one merges.
    tables, scale, splits, dropped, window, sinks, order, tokens, warps, stages, pdl
        See `split_attention.split_attention`.
    """
    assert window is None or dropped is not None
    parts, sequences, _ = qkv.shape
    kv_heads, head_dim = keys.shape[2:]
    out = torch.empty(sequences, heads.query_heads, head_dim, dtype=keys.dtype, device=qkv.device)
    merged = splits <= MOST_MERGED
    # one part is all there is
    shares = room_for_parts(out, splits if splits > 1 else 0)
    _step_kernel[(kv_heads, sequences, splits)](
        qkv,
        squares,
        positions,
        slots,
        *heads.table,
        *(heads.norms or heads.table),
        keys,
        values,
        tables,
        lengths,
        lengths if dropped is None else dropped,
        lengths if order is None else order,
        *shares,
        arrivals,
        out,
        sequences,
        heads.eps,
        scale * LOG2_E,
        tables.stride(0),
        ABOVE=triton.next_power_of_2(heads.query_heads // kv_heads),
        HEAD_DIM=head_dim,
        PARTS=parts,
        TILES=squares.shape[0],
        TILES_ABOVE=triton.next_power_of_2(squares.shape[0]),
        NORM=heads.norms is not None,
        SPLITS=splits,
        **key_options(heads.query_heads, keys, tokens, window, sinks),
        MERGED=merged,
        ORDERED=order is not None,
        PDL=pdl,
        num_warps=warps,
        num_stages=stages,
        **launch_options(pdl),
    )
    if splits > 1 and not merged:
        merge_splits(shares, out, splits, pdl=pdl)
    return out
