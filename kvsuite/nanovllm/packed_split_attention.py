"""Attention of single tokens over packed pages, cut along the keys. Importing this module needs triton.

`split_attention` for keys and values of 8 or 4 bits: the same grid, so that a captured step needs no plan on the host, but
what is read is half the bytes, and must become numbers that tensor cores multiply while the next pages arrive. Three things
make that cheap enough to read at the pace of memory:

- Codes are loaded as 16-bit words of neighbouring elements (`packed_elements`), for which hardware has transposing loads from
  shared memory. The first elements of all words make one product, the second ones another, and so on: no code ever moves
  to another thread.
- Scales are applied to scores (keys) and weights (values), one number a token in place of one an element.
- A rotation (``+hadamard``) is never undone: the query is rotated as the keys are, and the result once, at the end.

Queries are divided by a power of two each, so that float16 holds them whatever their size. Where numbers share scales in
groups within a token, every element is scaled and rounded to the model's dtype instead, which costs more.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.language.extra.cuda import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from .fused_kernels import launch_options
from .layer_pages import LayerPages
from .packed_elements import load_numbers, scale_groups, unpack_words, words_of
from .packed_vectors import hadamard_signs, side_options
from .split_attention import (
    LOG2_E,
    key_options,
    merge_splits,
    part_of,
    room_for_parts,
    sequence_of,
    splits_for,
    store_part,
)

# Keys of a step. With 4 warps and 4 stages fastest in whole steps on an H200; one warp and 32 keys are 3 % faster alone and
# 13 % slower in a step of 64 sequences.
_TOKENS = 128


@triton.jit
def _query_part(
    query, heads, inside, PART: tl.constexpr, PER: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATED: tl.constexpr
):
    """Every ``PER``-th number of the queries from ``PART`` on, float32 ``[QUERIES, HEAD_DIM / PER]``."""
    dims = tl.arange(0, HEAD_DIM // PER) * PER + PART
    if ROTATED:
        lanes = tl.arange(0, HEAD_DIM)
        own = tl.load(query + heads[:, None] * HEAD_DIM + lanes[None, :], mask=inside[:, None], other=0.0)
        signs = hadamard_signs(lanes[:, None], dims[None, :]).to(own.dtype)
        return tl.dot(own, signs, input_precision="ieee") * (HEAD_DIM**-0.5)
    else:
        return tl.load(query + heads[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0.0).to(
            tl.float32
        )


# neither another batch size nor another pool may cost a compilation
@triton.jit(do_not_specialize=["table_stride", "splits"])
def _packed_split_kernel(
    query,
    keys,
    key_scales,
    values,
    value_scales,
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
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD: tl.constexpr,
    KEY: tl.constexpr,
    KEY_NUMBERS: tl.constexpr,
    KEY_ELEMENTS: tl.constexpr,
    KEY_ROTATED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_NUMBERS: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    VALUE_ROTATED: tl.constexpr,
    MERGED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    # heads first: those of a token lie side by side, and programs that read neighbours run together
    head = tl.program_id(0)
    sequence = sequence_of(order, ORDERED)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    start, stop = part_of(length, split, splits, TOKENS)
    members = tl.arange(0, QUERIES)
    inside = tl.arange(0, TOKENS)
    dtype: tl.constexpr = query.dtype.element_ty
    # elements of a 16-bit word; a side in the model's dtype is one whole part
    KEY_PER: tl.constexpr = 1 if KEY == "auto" else 4 if KEY == "int4" else 2
    VALUE_PER: tl.constexpr = 1 if VALUE == "auto" else 4 if VALUE == "int4" else 2
    KEY_WORDS: tl.constexpr = HEAD_DIM // KEY_PER
    VALUE_WORDS: tl.constexpr = HEAD_DIM // VALUE_PER
    # groups of the whole vector scale scores and weights, smaller ones every element
    key_whole: tl.constexpr = KEY_ELEMENTS == HEAD_DIM
    value_whole: tl.constexpr = VALUE_ELEMENTS == HEAD_DIM
    key_words = tl.arange(0, KEY_WORDS)
    value_words = tl.arange(0, VALUE_WORDS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    heads = (sequence * KV_HEADS + head) * GROUP + members
    real = members < GROUP
    own_0 = _query_part(query, heads, real, 0, KEY_PER, HEAD_DIM, KEY_ROTATED)
    largest = tl.max(tl.abs(own_0), axis=1)
    if KEY_PER >= 2:
        own_1 = _query_part(query, heads, real, 1, KEY_PER, HEAD_DIM, KEY_ROTATED)
        largest = tl.maximum(largest, tl.max(tl.abs(own_1), axis=1))
    if KEY_PER == 4:
        own_2 = _query_part(query, heads, real, 2, KEY_PER, HEAD_DIM, KEY_ROTATED)
        own_3 = _query_part(query, heads, real, 3, KEY_PER, HEAD_DIM, KEY_ROTATED)
        largest = tl.maximum(largest, tl.maximum(tl.max(tl.abs(own_2), axis=1), tl.max(tl.abs(own_3), axis=1)))
    operand: tl.constexpr = dtype if KEY == "auto" or not key_whole else tl.float16
    unit = tl.full((QUERIES,), 1.0, dtype=tl.float32)
    if KEY != "auto" and key_whole:
        # the exponent alone: a power of two, by which nothing is rounded
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
        unit = exponent.to(tl.float32, bitcast=True)
    own_0 = (own_0 / unit[:, None]).to(operand)
    if KEY_PER >= 2:
        own_1 = (own_1 / unit[:, None]).to(operand)
    if KEY_PER == 4:
        own_2 = (own_2 / unit[:, None]).to(operand)
        own_3 = (own_3 / unit[:, None]).to(operand)
    if KEY_NUMBERS == 2 and key_whole:
        own_sum = tl.sum(own_0.to(tl.float32), axis=1) + tl.sum(own_1.to(tl.float32), axis=1)
        own_sum += tl.sum(own_2.to(tl.float32), axis=1) + tl.sum(own_3.to(tl.float32), axis=1)
    unit *= scale
    top = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    lowest = tl.zeros((QUERIES,), dtype=tl.float32)
    acc_0 = tl.zeros((QUERIES, VALUE_WORDS), dtype=tl.float32)
    if VALUE_PER >= 2:
        acc_1 = tl.zeros((QUERIES, VALUE_WORDS), dtype=tl.float32)
    if VALUE_PER == 4:
        acc_2 = tl.zeros((QUERIES, VALUE_WORDS), dtype=tl.float32)
        acc_3 = tl.zeros((QUERIES, VALUE_WORDS), dtype=tl.float32)
    if WINDOW:
        # tokens left the table behind the sinks' blocks; the query is the last one
        gone = tl.load(dropped + sequence)
        before = length + gone - WINDOW
    for at in range(start, stop, TOKENS):
        tokens = at + inside
        valid = tokens < stop
        if WINDOW:
            valid = valid & ((tokens < SINKS) | (tokens + tl.where(tokens >= HEAD, gone, 0) >= before))
        # behind the last token that one again: loads without masks are fewer instructions
        there = tl.minimum(tokens, stop - 1)
        block = tl.load(tables + sequence * table_stride + there // BLOCK_SIZE).to(tl.int64)
        row = (block * BLOCK_SIZE + there % BLOCK_SIZE) * KV_HEADS + head

        packed = tl.load(keys + row[None, :] * KEY_WORDS + key_words[:, None])
        if KEY == "auto":
            scores = tl.dot(own_0, packed, input_precision="ieee")
        else:
            parts = unpack_words(packed, KEY, ASSEMBLY)
            if not key_whole:
                parts = scale_groups(
                    parts, key_scales, row[None, :], key_words[:, None] * KEY_PER, KEY_PER, KEY_ELEMENTS,
                    KEY_NUMBERS, HEAD_DIM, dtype,
                )  # fmt: skip
            scores = tl.dot(own_0, parts[0])
            scores = tl.dot(own_1, parts[1], scores)
            if KEY_PER == 4:
                scores = tl.dot(own_2, parts[2], scores)
                scores = tl.dot(own_3, parts[3], scores)
        if KEY_NUMBERS > 0 and key_whole:
            factor, least = load_numbers(key_scales, row, KEY_NUMBERS, BLOCK_SIZE * KV_HEADS % 2 == 0)
            scores *= factor[None, :]
            if KEY_NUMBERS == 2:
                scores += own_sum[:, None] * least[None, :]
        scores = tl.where(valid[None, :], scores * unit[:, None], float("-inf"))

        packed = tl.load(values + row[:, None] * VALUE_WORDS + value_words[None, :])
        if VALUE_NUMBERS > 0 and value_whole:
            # weights times scales must stay below 1 for float16, so the largest product is the reference, not the largest
            # weight; up to a power of two, which is read off the exponent. No scale but 0 is below 2^-24.
            factor, least = load_numbers(value_scales, row, VALUE_NUMBERS, BLOCK_SIZE * KV_HEADS % 2 == 0)
            lift = tl.maximum((factor.to(tl.int32, bitcast=True) >> 23) - 126, -23)
            higher = tl.maximum(top, tl.max(scores + lift.to(tl.float32)[None, :], axis=1))
        else:
            higher = tl.maximum(top, tl.max(scores, axis=1))
        # where no token so far is seen, a difference of infinities is no number
        level = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW else higher
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher
        if VALUE == "auto":
            acc_0 = tl.dot(weights.to(packed.dtype), packed, acc_0 * shrink[:, None], input_precision="ieee")
        else:
            parts = unpack_words(packed, VALUE, ASSEMBLY)
            if value_whole:
                if VALUE_NUMBERS == 2:
                    lowest = lowest * shrink + tl.sum(weights * least[None, :], axis=1)
                if VALUE_NUMBERS > 0:
                    weights *= factor[None, :]
                weights = weights.to(tl.float16)
            else:
                parts = scale_groups(
                    parts, value_scales, row[:, None], value_words[None, :] * VALUE_PER, VALUE_PER,
                    VALUE_ELEMENTS, VALUE_NUMBERS, HEAD_DIM, dtype,
                )  # fmt: skip
                weights = weights.to(dtype)
            acc_0 = tl.dot(weights, parts[0], acc_0 * shrink[:, None])
            acc_1 = tl.dot(weights, parts[1], acc_1 * shrink[:, None])
            if VALUE_PER == 4:
                acc_2 = tl.dot(weights, parts[2], acc_2 * shrink[:, None])
                acc_3 = tl.dot(weights, parts[3], acc_3 * shrink[:, None])
    acc = acc_0
    if VALUE_PER == 2:
        acc = tl.reshape(tl.join(acc_0, acc_1), (QUERIES, HEAD_DIM))
    if VALUE_PER == 4:
        acc = tl.reshape(tl.join(tl.join(acc_0, acc_2), tl.join(acc_1, acc_3)), (QUERIES, HEAD_DIM))
    if VALUE_NUMBERS == 2 and value_whole:
        acc += lowest[:, None]
    if MERGED or VALUE_ROTATED:
        store_part(mixed, maxima, sums, heads * splits + split, acc, top, total, real, HEAD_DIM)
    else:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        lanes = tl.arange(0, HEAD_DIM)
        tl.store(out + heads[:, None] * HEAD_DIM + lanes[None, :], result, mask=real[:, None])


def packed_splits_for(sequences: int, kv_heads: int, processors: int, longest: int) -> int:
    """Parts that keys are cut into: `splits_for`, but none that has no step of keys even in the longest sequence."""
    steps = max(1, longest // _TOKENS)
    return min(splits_for(sequences, kv_heads, processors), 1 << (steps.bit_length() - 1))


def packed_split_attention(
    query: Tensor,
    keys: LayerPages,
    values: LayerPages,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    splits: int,
    dropped: Tensor | None = None,
    window: int | None = None,
    sinks: int = 0,
    order: Tensor | None = None,
    tokens: int = _TOKENS,
    warps: int = 4,
    stages: int = 4,
    pdl: bool = False,
    assembly: bool = True,
) -> Tensor:
    """Attention of one token a sequence over packed keys and values, ``[S, heads, head_dim]``.

    Parameters
    ----------
    query
        ``[S, heads, head_dim]`` in bfloat16 or float16, contiguous.
    keys, values
        The layer's pages; a group of numbers has to divide ``head_dim``.
    tables, lengths, scale, dropped, window, sinks, order, tokens, warps, stages, pdl
        As in `split_attention`.
    splits
        A power of two, see `packed_splits_for`.
    assembly
        Off for triton's interpreter, which knows none.
    """
    assert window is None or dropped is not None
    sequences, heads, head_dim = query.shape
    merged = splits > 1 or values.side.hadamard
    out = torch.empty_like(query)
    parts = room_for_parts(out, splits if merged else 0)
    _packed_split_kernel[(keys.codes.shape[2], sequences, splits)](
        query,
        words_of(keys),
        keys.scales,
        words_of(values),
        values.scales,
        tables,
        lengths,
        lengths if dropped is None else dropped,
        lengths if order is None else order,
        *parts,
        out,
        scale * LOG2_E,
        tables.stride(0),
        splits,
        HEAD_DIM=head_dim,
        **key_options(heads, keys.codes, tokens, window, sinks),
        MERGED=splits > 1,
        ASSEMBLY=assembly,
        ORDERED=order is not None,
        PDL=pdl,
        **side_options(keys.side, head_dim, "KEY"),
        **side_options(values.side, head_dim, "VALUE"),
        num_warps=warps,
        num_stages=stages,
        **launch_options(pdl),
    )
    if merged:
        merge_splits(parts, out, splits, rotated=values.side.hadamard, pdl=pdl)
    return out
