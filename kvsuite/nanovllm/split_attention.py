"""Attention of single tokens over paged keys, cut along the keys. Importing this module needs triton.

Where sequences are few, each one's keys are shared by so many programs that the device is full (flash decoding, Dao et al.
2023). Grid and buffers depend on shapes alone, so a captured step needs no plan on the host.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.language.extra.cuda import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from .fused_kernels import launch_options
from .packed_vectors import hadamard_signs

LOG2_E = 1.4426950408889634
# the tensor cores' smallest side
FEWEST_QUERIES = 16


@triton.jit
def part_of(length, split, splits, TOKENS: tl.constexpr):
    """First token of one of ``splits`` parts of the keys, and the one behind its last."""
    span = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    start = split * span
    return start, tl.minimum(start + span, length)


@triton.jit
def store_part(mixed, maxima, sums, parts, acc, top, total, present, HEAD_DIM: tl.constexpr):
    """Leave what queries saw of a part of the keys to whoever merges."""
    lanes = tl.arange(0, HEAD_DIM)
    tl.store(mixed + parts[:, None] * HEAD_DIM + lanes[None, :], acc, mask=present[:, None])
    tl.store(maxima + parts, top, mask=present)
    tl.store(sums + parts, total, mask=present)


@triton.jit
def attend_part(
    own,
    top,
    total,
    acc,
    start,
    stop,
    sequence,
    head,
    keys,
    values,
    tables,
    lengths,
    dropped,
    scale,
    table_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Let queries ``own`` see tokens ``start`` to ``stop``: maxima, sums of weights and weighed values, carried on."""
    lanes = tl.arange(0, HEAD_DIM)
    inside = tl.arange(0, TOKENS)
    if WINDOW:
        # tokens left the table behind the sinks' blocks; the query is the last one
        gone = tl.load(dropped + sequence)
        before = tl.load(lengths + sequence) + gone - WINDOW
    for at in range(start, stop, TOKENS):
        tokens = at + inside
        valid = tokens < stop
        if WINDOW:
            valid = valid & ((tokens < SINKS) | (tokens + tl.where(tokens >= HEAD, gone, 0) >= before))
        block = tl.load(tables + sequence * table_stride + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        row = (block * BLOCK_SIZE + tokens % BLOCK_SIZE) * KV_HEADS + head
        key = tl.load(keys + row[None, :] * HEAD_DIM + lanes[:, None], mask=valid[None, :], other=0.0)
        scores = tl.dot(own, key, input_precision="ieee") * scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # where no token so far is seen, a difference of infinities is no number
        level = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW else higher
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        value = tl.load(values + row[:, None] * HEAD_DIM + lanes[None, :], mask=valid[:, None], other=0.0)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
    return top, total, acc


@triton.jit(do_not_specialize=["count"])
def _longest_first_kernel(lengths, order, count, BLOCK: tl.constexpr):
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + own, mask=own < count, other=0)[:, None]
    place = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, count, BLOCK):
        others = at + tl.arange(0, BLOCK)
        other = tl.load(lengths + others, mask=others < count, other=-1)[None, :]
        before = (other > length) | ((other == length) & (others[None, :] < own[:, None]))
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order + place, own, mask=own < count)


def longest_first(lengths: Tensor, out: Tensor) -> Tensor:
    """Order sequences by their length, the longest first, equal ones as they come.

    Programs begin in this order: a long sequence that came last would be read by one program while all others have ended.

    Parameters
    ----------
    lengths
        int32 ``[S]``.
    out
        int32 ``[S]``, overwritten and returned.
    """
    count, block = lengths.shape[0], 64
    _longest_first_kernel[(triton.cdiv(count, block),)](lengths, out, count, BLOCK=block)
    return out


@triton.jit
def sequence_of(order, ORDERED: tl.constexpr):
    """The sequence of a program: the second number of its place in the grid, by ``order`` if there is one."""
    place = tl.program_id(1)
    if ORDERED:
        place = tl.load(order + place)
    return place.to(tl.int64)


# tables of any width must not cost a compilation
@triton.jit(do_not_specialize=["table_stride"])
def _split_kernel(
    query,
    keys,
    values,
    tables,
    lengths,
    dropped,
    order,
    mixed,
    maxima,
    sums,
    out,
    scale,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD: tl.constexpr,
    ORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    # heads lie side by side in a page
    head = tl.program_id(0)
    sequence = sequence_of(order, ORDERED)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    start, stop = part_of(length, split, SPLITS, TOKENS)
    members = tl.arange(0, QUERIES)
    lanes = tl.arange(0, HEAD_DIM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    heads = (sequence * KV_HEADS + head) * GROUP + members
    own = tl.load(query + heads[:, None] * HEAD_DIM + lanes[None, :], mask=(members < GROUP)[:, None], other=0.0)
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    acc = tl.zeros((QUERIES, HEAD_DIM), dtype=tl.float32)
    top, total, acc = attend_part(
        own, top, total, acc, start, stop, sequence, head, keys, values, tables, lengths, dropped, scale, table_stride,
        KV_HEADS, HEAD_DIM, BLOCK_SIZE, TOKENS, WINDOW, SINKS, HEAD,
    )  # fmt: skip
    if SPLITS == 1:
        found = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + heads[:, None] * HEAD_DIM + lanes[None, :], found, mask=(members < GROUP)[:, None])
    else:
        store_part(mixed, maxima, sums, heads * SPLITS + split, acc, top, total, members < GROUP, HEAD_DIM)


@triton.jit
def _merge_kernel(
    mixed, maxima, sums, out, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, ROTATED: tl.constexpr, PDL: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    parts = head * SPLITS + tl.arange(0, SPLITS)
    lanes = tl.arange(0, HEAD_DIM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tops = tl.load(maxima + parts)
    # a part that sees no token has -inf and weighs nothing; the query's own is always seen
    weights = tl.exp2(tops - tl.max(tops, axis=0))
    total = tl.sum(weights * tl.load(sums + parts), axis=0)
    if ROTATED:
        # lanes down, so that the sum of parts is where the sum over the matrix needs it
        acc = tl.load(mixed + parts[None, :] * HEAD_DIM + lanes[:, None])
        rotated = tl.sum(acc * weights[None, :], axis=1)
        turned = tl.sum(hadamard_signs(lanes[:, None], lanes[None, :]) * rotated[:, None], axis=0)
        result = turned * (HEAD_DIM**-0.5) / total
    else:
        acc = tl.load(mixed + parts[:, None] * HEAD_DIM + lanes[None, :])
        result = tl.sum(acc * weights[:, None], axis=0) / total
    tl.store(out + head * HEAD_DIM + lanes, result.to(out.dtype.element_ty))


class Parts(NamedTuple):
    """What queries see of parts of the keys, one entry a sequence, head and part.

    Parameters
    ----------
    mixed
        float32 ``[S * heads * splits, head_dim]``: sums of values by weights ``2 ** (score - maximum)``.
    maxima, sums
        float32 ``[S * heads * splits]``: the reference of a part's weights, -inf where it sees no token, and their sum.
    """

    mixed: Tensor
    maxima: Tensor
    sums: Tensor


def room_for_parts(out: Tensor, splits: int) -> Parts:
    """Room for the parts of ``out`` ``[S, heads, head_dim]``."""
    sequences, heads, head_dim = out.shape
    count = sequences * heads * splits
    mixed = torch.empty(count, head_dim, dtype=torch.float32, device=out.device)
    maxima, sums = (torch.empty(count, dtype=torch.float32, device=out.device) for _ in range(2))
    return Parts(mixed, maxima, sums)


def key_options(query_heads: int, keys: Tensor, tokens: int, window: int | None, sinks: int) -> dict[str, Any]:
    """Options of a kernel that reads pages ``[num_blocks, block_size, kv_heads, ..]``, ``tokens`` keys a step."""
    block_size, kv_heads = keys.shape[1:3]
    group = query_heads // kv_heads
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "QUERIES": max(FEWEST_QUERIES, triton.next_power_of_2(group)),
        "BLOCK_SIZE": block_size,
        "TOKENS": tokens,
        "WINDOW": window or 0,
        "SINKS": sinks,
        "HEAD": -(-sinks // block_size) * block_size,
    }


def merge_splits(parts: Parts, out: Tensor, splits: int, *, rotated: bool = False, pdl: bool = False) -> None:
    """Attention from its parts over cuts of the keys.

    Parameters
    ----------
    parts
        Of all heads.
    out
        ``[S, heads, head_dim]``, contiguous, overwritten.
    splits
        Parts of a query, a power of two.
    rotated
        Whether values are rotated by the Hadamard matrix, which is undone.
    pdl
        Whether neighbours in the stream may overlap.
    """
    sequences, heads, head_dim = out.shape
    _merge_kernel[(sequences * heads,)](
        *parts, out, HEAD_DIM=head_dim, SPLITS=splits, ROTATED=rotated, PDL=pdl, num_warps=4,
        **launch_options(pdl),
    )  # fmt: skip


def splits_for(sequences: int, kv_heads: int, processors: int) -> int:
    """Parts that a sequence's keys are cut into: a power of two that gives at least two programs a processor.

    Whole sequences are read where they give 2.75: fewer leave too much of the device idle (docs/measurements.md).
    """
    splits = 1 if sequences * kv_heads >= 2.75 * processors else 2
    while splits < 64 and sequences * kv_heads * splits < 2 * processors:
        splits *= 2
    return splits


def split_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    splits: int,
    dropped: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    order: Tensor | None = None,
    tokens: int = 64,
    warps: int = 4,
    stages: int | None = None,
    pdl: bool = False,
) -> Tensor:
    """Attention of one token a sequence, ``[S, heads, head_dim]``.

    Parameters
    ----------
    query
        ``[S, heads, head_dim]``, contiguous.
    keys, values
        ``[num_blocks, block_size, kv_heads, head_dim]``, contiguous.
    tables
        int32 ``[S, max_blocks]``.
    lengths
        int32 ``[S]``, at least 1.
    scale
        Factor of the scores.
    splits
        A power of two, see `splits_for`.
    dropped
        int32 ``[S]``: tokens between the sinks' blocks and the rest of the table that are gone; read where there is a window.
    window, sinks
        A token sees the last ``window`` ones, its own among them, and the first ``sinks``; everything without a window.
    order
        int32 ``[S]``, in which order sequences begin (`longest_first`); as they come if left out.
    tokens, warps, stages
        Keys a step, warps of a program, steps whose loads are under way. The defaults were fastest in whole
        steps on an H200: two stages for at most two parts, three for more. 2 warps and 2 stages are 1 % faster alone and 15 %
        slower in a step.
    pdl
        Whether neighbours in the stream may overlap.
    """
    assert window is None or dropped is not None
    sequences, heads, head_dim = query.shape
    out = torch.empty_like(query)
    # one part is all there is
    parts = room_for_parts(out, splits if splits > 1 else 0)
    if stages is None:
        stages = 2 if splits <= 2 else 3
    _split_kernel[(keys.shape[2], sequences, splits)](
        query,
        keys,
        values,
        tables,
        lengths,
        lengths if dropped is None else dropped,
        lengths if order is None else order,
        *parts,
        out,
        scale * LOG2_E,
        tables.stride(0),
        HEAD_DIM=head_dim,
        SPLITS=splits,
        **key_options(heads, keys, tokens, window, sinks),
        ORDERED=order is not None,
        PDL=pdl,
        num_warps=warps,
        num_stages=stages,
        **launch_options(pdl),
    )
    if splits > 1:
        merge_splits(parts, out, splits, pdl=pdl)
    return out
