"""Attention of single tokens over packed pages, cut along the keys. Importing this module needs triton.

`split_attention` for keys and values of 8 or 4 bits: the same grid, so that a captured step needs no plan on the host, but
what is read is half the bytes, and must become numbers that tensor cores multiply while the next pages arrive. Three things
make that cheap enough to read at the pace of memory:

- Codes are loaded as 16-bit words of neighbouring elements (two of 8 bits, four of 4), for which hardware has transposing
  loads from shared memory. The first elements of all words make one product, the second ones another, and so on: no code
  ever moves to another thread.
- A few instructions make float16 of the codes of two words at once, exactly. Scales are applied to scores (keys) and
  weights (values), one number a token in place of one an element.
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
from .packed_vectors import side_options
from .split_attention import splits_for

_LOG2_E = 1.4426950408889634
# the tensor cores' smallest side
_FEWEST_QUERIES = 16
# Keys of a step. With 4 warps and 4 stages fastest in whole steps on an H200; one warp and 32 keys are 3 % faster alone and
# 13 % slower in a step of 64 sequences.
_TOKENS = 128


@triton.jit
def _elements(words, NUMBER: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The elements of 16-bit words of codes, in order, as float16 tensors of the words' shape: 2, or 4 of ``int4``.

    In assembly two words at a time; without, which the interpreter needs, the same numbers.
    """
    if NUMBER == "fp8_e4m3":
        if ASSEMBLY:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b16 first, second;
                .reg .b32 sorted;
                prmt.b32 sorted, $2, $2, 0x3120;
                mov.b32 {first, second}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, first;
                cvt.rn.f16x2.e4m3x2 $1, second;
                }
                """,
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            low = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
            high = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
            return low, high
    elif NUMBER == "int8":
        if ASSEMBLY:
            # 0x6400 | n is 1024 + n, and n ^ 0x80 is 128 more than the number in two's complement
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 shifted, low, high, base;
                mov.b32 base, 0x64806480;
                xor.b32 shifted, $2, 0x80808080;
                prmt.b32 low, shifted, 0x64646464, 0x4240;
                prmt.b32 high, shifted, 0x64646464, 0x4341;
                sub.f16x2 $0, low, base;
                sub.f16x2 $1, high, base;
                }
                """,
                "=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return words.to(tl.int8).to(tl.float16), (words >> 8).to(tl.int8).to(tl.float16)
    else:
        if ASSEMBLY:
            # 0x6400 | n is 1024 + n, and 0x6400 | n << 4 is 1024 + 16 n; less 1024, or by 1 / 16 less 64
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 upper, a, b, c, d, base, part, less;
                mov.b32 base, 0x64006400;
                mov.b32 part, 0x2c002c00;
                mov.b32 less, 0xd400d400;
                shr.u32 upper, $4, 8;
                lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 b, $4, 0x00f000f0, 0x64006400, 0xea;
                lop3.b32 c, upper, 0x000f000f, 0x64006400, 0xea;
                lop3.b32 d, upper, 0x00f000f0, 0x64006400, 0xea;
                sub.f16x2 $0, a, base;
                fma.rn.f16x2 $1, b, part, less;
                sub.f16x2 $2, c, base;
                fma.rn.f16x2 $3, d, part, less;
                }
                """,
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            return (
                (words & 15).to(tl.float16),
                ((words >> 4) & 15).to(tl.float16),
                ((words >> 8) & 15).to(tl.float16),
                ((words >> 12) & 15).to(tl.float16),
            )


@triton.jit
def hadamard_signs(first, second):
    """Entries of Sylvester's matrix: -1 where the indices have an odd number of ones in common, else 1; float32."""
    common = first & second
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 1.0 - 2.0 * (common & 1).to(tl.float32)


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


@triton.jit
def _numbers(scales, row, COUNT: tl.constexpr, PAIRED: tl.constexpr):
    """A token's scale and least value, float32: one load of four bytes, which can be under way while others are used."""
    if COUNT == 1 and not PAIRED:
        # an odd number of heads in a block: not every layer begins at four bytes
        first = tl.load(scales + row).to(tl.float32)
        return first, first
    elif COUNT == 1:
        # two heads share four bytes
        both = tl.load(scales.to(tl.pointer_type(tl.int32)) + (row >> 1))
        first = (both >> ((row & 1) * 16).to(tl.int32)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return first, first
    else:
        both = tl.load(scales.to(tl.pointer_type(tl.int32)) + row)
        first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return first, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scaled(
    part,
    scales,
    row,
    dims,
    ELEMENTS: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    dtype: tl.constexpr,
):
    at = (row * (HEAD_DIM // ELEMENTS) + dims // ELEMENTS) * COUNT
    wide = part.to(tl.float32) * tl.load(scales + at).to(tl.float32)
    if COUNT == 2:
        wide += tl.load(scales + at + 1).to(tl.float32)
    return wide.to(dtype)


@triton.jit
def _in_groups(
    parts,
    scales,
    row,
    dims,
    PER: tl.constexpr,
    ELEMENTS: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    dtype: tl.constexpr,
):
    """Elements of groups within a token times their scale plus their least value, rounded to the model's dtype."""
    first = _scaled(parts[0], scales, row, dims, ELEMENTS, COUNT, HEAD_DIM, dtype)
    second = _scaled(parts[1], scales, row, dims + 1, ELEMENTS, COUNT, HEAD_DIM, dtype)
    if PER == 2:
        return first, second
    else:
        third = _scaled(parts[2], scales, row, dims + 2, ELEMENTS, COUNT, HEAD_DIM, dtype)
        fourth = _scaled(parts[3], scales, row, dims + 3, ELEMENTS, COUNT, HEAD_DIM, dtype)
        return first, second, third, fourth


# neither another batch size nor another pool may cost a compilation
@triton.jit(do_not_specialize=["table_stride", "splits"])
def _split_kernel(
    query,
    keys,
    key_scales,
    values,
    value_scales,
    tables,
    lengths,
    dropped,
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
    PDL: tl.constexpr,
):
    # heads first: those of a token lie side by side, and programs that read neighbours run together
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    span = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    start = split * span
    stop = tl.minimum(start + span, length)
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
            parts = _elements(packed, KEY, ASSEMBLY)
            if not key_whole:
                parts = _in_groups(
                    parts, key_scales, row[None, :], key_words[:, None] * KEY_PER, KEY_PER, KEY_ELEMENTS,
                    KEY_NUMBERS, HEAD_DIM, dtype,
                )  # fmt: skip
            scores = tl.dot(own_0, parts[0])
            scores = tl.dot(own_1, parts[1], scores)
            if KEY_PER == 4:
                scores = tl.dot(own_2, parts[2], scores)
                scores = tl.dot(own_3, parts[3], scores)
        if KEY_NUMBERS > 0 and key_whole:
            factor, least = _numbers(key_scales, row, KEY_NUMBERS, BLOCK_SIZE * KV_HEADS % 2 == 0)
            scores *= factor[None, :]
            if KEY_NUMBERS == 2:
                scores += own_sum[:, None] * least[None, :]
        scores = tl.where(valid[None, :], scores * unit[:, None], float("-inf"))

        packed = tl.load(values + row[:, None] * VALUE_WORDS + value_words[None, :])
        if VALUE_NUMBERS > 0 and value_whole:
            # weights times scales must stay below 1 for float16, so the largest product is the reference, not the largest
            # weight; up to a power of two, which is read off the exponent. No scale but 0 is below 2^-24.
            factor, least = _numbers(value_scales, row, VALUE_NUMBERS, BLOCK_SIZE * KV_HEADS % 2 == 0)
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
            parts = _elements(packed, VALUE, ASSEMBLY)
            if value_whole:
                if VALUE_NUMBERS == 2:
                    lowest = lowest * shrink + tl.sum(weights * least[None, :], axis=1)
                if VALUE_NUMBERS > 0:
                    weights *= factor[None, :]
                weights = weights.to(tl.float16)
            else:
                parts = _in_groups(
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
    lanes = tl.arange(0, HEAD_DIM)
    if MERGED or VALUE_ROTATED:
        place = heads * splits + split
        tl.store(mixed + place[:, None] * HEAD_DIM + lanes[None, :], acc, mask=real[:, None])
        tl.store(maxima + place, top, mask=real)
        tl.store(sums + place, total, mask=real)
    else:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + heads[:, None] * HEAD_DIM + lanes[None, :], result, mask=real[:, None])


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


def _words(pages: LayerPages) -> Tensor:
    """Packed codes by 16-bit words; what is not packed as it is."""
    return pages.codes.view(torch.int16) if pages.side.is_packed else pages.codes


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
    tokens, warps, stages
        Keys a step, warps of a program, steps whose loads are under way.
    pdl
        Whether neighbours in the stream may overlap.
    assembly
        Off for triton's interpreter, which knows none.
    """
    assert window is None or dropped is not None
    sequences, heads, head_dim = query.shape
    block_size, kv_heads = keys.codes.shape[1:3]
    group = heads // kv_heads
    merged = splits > 1 or values.side.hadamard
    count = sequences * heads * splits if merged else 0
    mixed = torch.empty(count, head_dim, dtype=torch.float32, device=query.device)
    maxima = torch.empty(count, dtype=torch.float32, device=query.device)
    sums = torch.empty_like(maxima)
    out = torch.empty_like(query)
    _split_kernel[(kv_heads, sequences, splits)](
        query,
        _words(keys),
        keys.scales,
        _words(values),
        values.scales,
        tables,
        lengths,
        lengths if dropped is None else dropped,
        mixed,
        maxima,
        sums,
        out,
        scale * _LOG2_E,
        tables.stride(0),
        splits,
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERIES=max(_FEWEST_QUERIES, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TOKENS=tokens,
        WINDOW=window or 0,
        SINKS=sinks,
        HEAD=-(-sinks // block_size) * block_size,
        MERGED=splits > 1,
        ASSEMBLY=assembly,
        PDL=pdl,
        **side_options(keys.side, head_dim, "KEY"),
        **side_options(values.side, head_dim, "VALUE"),
        num_warps=warps,
        num_stages=stages,
        **launch_options(pdl),
    )
    if merged:
        _merge_kernel[(sequences * heads,)](
            mixed, maxima, sums, out, HEAD_DIM=head_dim, SPLITS=splits, ROTATED=values.side.hadamard, PDL=pdl,
            num_warps=4, **launch_options(pdl),
        )  # fmt: skip
    return out
