"""Products with packed weights on CUDA. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import functools
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.nn import functional as F

from .formats import DENSE_TILE, values_per_word
from .packed import PackedWeight

#: tokens up to which the product reads the packed words itself, by the bytes of an activation; above, tiles are dequantised
#: for torch's matmul, which on an H200 is then the faster way in float32
FEW_ROWS = {2: 64, 4: 16}


class Tile(NamedTuple):
    """How a product with few tokens is cut.

    Parameters
    ----------
    rows, words
        Of the weight, in a tile.
    warps
        That work on a tile.
    stages
        Tiles in flight.
    programs
        A multiprocessor should have, so that enough loads are in flight: programs share the words of a row until it does.
    """

    rows: int
    words: int
    warps: int
    stages: int
    programs: int


def best_tile(tokens: int, element_bytes: int) -> Tile:
    """The fastest tile of docs/measurements/group_matmul.py on an H200."""
    if tokens <= 8:
        tile = Tile(rows=32, words=64, warps=2, stages=2, programs=4)
    elif tokens <= 16:
        tile = Tile(rows=64, words=32, warps=2, stages=3, programs=2)
    else:
        tile = Tile(rows=128, words=32, warps=8, stages=2, programs=2)
    # float32 activations and products take twice the shared memory and registers
    return tile if element_bytes == 2 else tile._replace(rows=64, words=16, warps=4)


# of two values side by side: 0x6400 | stored
_LEVEL_4 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, $2; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }")
_LEVEL_3 = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, $2; lop3.b32 $0, t, 0x00070007, 0x64006400, 0xEA; }")


@triton.jit
def _by_value_kernel(
    x, out, tokens, columns, words, x_stride,
    PER_WORD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out[i, token, w] = x[token, w * PER_WORD + i]``: inputs that meet value i of every word, zeros around them."""
    m = tl.program_id(0)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    for i in tl.static_range(PER_WORD):
        k = w * PER_WORD + i
        value = tl.load(x + m * x_stride + k, mask=(k < columns) & (m < tokens), other=0.0)
        tl.store(out + (i * BLOCK_M + m) * words + w, value)


@triton.jit
def _few_rows_kernel(
    x, words, scales, bias, out,
    tokens, rows, groups, x_words, span,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, GROUP_WORDS: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All tokens at once: value i of every word of a tile makes one matrix product of depth BLOCK_W.

    A program takes ``span`` words of its rows. With ``SPLIT``, ``out`` is ``[part, token, n]`` in float32.
    """
    HALF: tl.constexpr = PER_WORD // 2
    MAXIMUM: tl.constexpr = (1 << (BITS - 1)) - 1
    LEVEL: tl.constexpr = _LEVEL_4 if BITS == 4 else _LEVEL_3
    GROUPS: tl.constexpr = BLOCK_W // GROUP_WORDS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    live_n = n < rows
    row_words = groups * GROUP_WORDS
    word_rows, scale_rows, step = _rows(words, scales, n, rows, groups, GROUP_WORDS, TRANSPOSED)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = tl.program_id(1) * span
    for start in tl.range(first, tl.minimum(first + span, row_words), BLOCK_W, num_stages=STAGES):
        w = start + tl.arange(0, BLOCK_W)
        g = start // GROUP_WORDS + tl.arange(0, GROUPS)
        packed = tl.load(word_rows + w[None, :] * step, mask=live_n[:, None] & (w < row_words)[None, :], other=0)
        # each scale once: spread by the layout and not by the addresses, it goes the way of the words into the matrix
        # units, and all that is done with a word stays in its registers
        few = tl.load(scale_rows + g[None, :] * step, mask=live_n[:, None] & (g < groups)[None, :], other=0.0)
        scale = tl.broadcast_to(few[:, :, None], (BLOCK_N, GROUPS, GROUP_WORDS)).reshape(BLOCK_N, BLOCK_W)
        # two words a register from here on: 16 bits of one beside 16 bits of the other, half of their values in them
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $4, $5, 0x7632;", "=r,=r,r,r,r,r",
            [packed, packed << ((32 - PER_WORD * BITS) // 2)],
            dtype=(tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
        for i in tl.static_range(PER_WORD):
            value = tl.load(x + (i * BLOCK_M + m)[None, :] * x_words + w[:, None])
            # the low mantissa of float16's 1024 + stored: an integer-to-float conversion without the (slow) instruction
            bits = tl.inline_asm_elementwise(
                LEVEL, "=r,r,r,r", [low if i < HALF else high, (i % HALF) * BITS],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
            level = bits - (1024.0 + MAXIMUM)
            total = tl.dot(level.to(scale.dtype) * scale, value, total, input_precision="tf32x3")
    if SPLIT:
        at = (tl.program_id(1) * BLOCK_M + m).to(tl.int64)
        tl.store(out + at[None, :] * rows + n[:, None], total, mask=live_n[:, None])
    else:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        at = out + m.to(tl.int64)[None, :] * rows + n[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=live_n[:, None] & (m < tokens)[None, :])


@triton.jit
def _sum_kernel(
    parts, bias, out, rows,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[token, n]`` from its parts, always in the same order."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * BLOCK_M + m) * rows + n, mask=n < rows, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(out + m * rows + n, total.to(out.dtype.element_ty), mask=n < rows)


@triton.jit
def _dequantize_kernel(
    words, scales, out,
    first, rows, all_rows, columns, groups,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, GROUP_WORDS: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``first ... first + rows`` as a dense row-major matrix, bit for bit those of `dequantize_groups`."""
    MASK: tl.constexpr = (1 << BITS) - 1
    MAXIMUM: tl.constexpr = (1 << (BITS - 1)) - 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (n < rows)[:, None] & (k < columns)[None, :]
    word_rows, scale_rows, step = _rows(words, scales, first + n, all_rows, groups, GROUP_WORDS, TRANSPOSED)
    w = k // PER_WORD
    packed = tl.load(word_rows + w[None, :] * step, mask=live, other=0)
    scale = tl.load(scale_rows + (w // GROUP_WORDS)[None, :] * step, mask=live, other=0.0)
    level = ((packed >> ((k % PER_WORD) * BITS)[None, :]) & MASK) - MAXIMUM
    tl.store(out + n.to(tl.int64)[:, None] * columns + k[None, :], level.to(scale.dtype) * scale, mask=live)


@triton.jit
def _rows(words, scales, n, rows, groups, GROUP_WORDS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """First word and first scale of rows ``n``, ``[n, 1]``, and the step from one to the next.

    Computed, and not given as strides, so that the compiler knows what they are multiples of.
    """
    if TRANSPOSED:
        word_rows, scale_rows, step = words + n[:, None], scales + n[:, None], tl.full((), 0, tl.int64) + rows
    else:
        at = n.to(tl.int64)[:, None] * groups
        word_rows, scale_rows, step = words + at * GROUP_WORDS, scales + at, tl.full((), 1, tl.int64)
    return word_rows, scale_rows, step


def group_matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` on CUDA.

    Parameters
    ----------
    x
        ``[tokens, columns]`` in the compute dtype of the weight.
    weight
        Packed ``[rows, columns]``.
    bias
        ``[rows]`` or ``None``.

    Returns
    -------
    Tensor
        ``[tokens, rows]`` in the dtype of ``x``. Up to `FEW_ROWS` tokens read the packed words themselves, more dequantise
        a tile at a time for torch's matmul.
    """
    tokens = x.shape[0]
    if tokens <= FEW_ROWS[x.element_size()]:
        return few_rows_product(x, weight, bias)
    step = max(1, DENSE_TILE // weight.columns)
    if step >= weight.rows:
        return F.linear(x, dequantize(weight), bias)
    out = x.new_empty(tokens, weight.rows)
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        out[:, start:stop] = F.linear(x, dequantize(weight, start, stop), None if bias is None else bias[start:stop])
    return out


def few_rows_product(x: Tensor, weight: PackedWeight, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """The product on the tensor cores for up to `FEW_ROWS` tokens: every word is read once.

    Parameters
    ----------
    x, weight, bias
        As for `group_matmul`.
    tile
        How the work is cut, ``None`` for `best_tile`.
    """
    x = x.contiguous()
    tokens, rows, row_words = x.shape[0], weight.rows, weight.spec.words(weight.columns)
    block_n, block_w, warps, stages, programs = tile or best_tile(tokens, x.element_size())
    block_m = max(8, triton.next_power_of_2(tokens))
    tiles = triton.cdiv(row_words, block_w)
    wanted = triton.cdiv(programs * _multiprocessors(x.device), triton.cdiv(rows, block_n))
    # every part has a tile, and the last one may be shorter
    span = triton.cdiv(tiles, min(wanted, tiles))
    parts = triton.cdiv(tiles, span)
    constants = _constants(weight)
    by_value = x.new_empty(constants["PER_WORD"], block_m, tiles * block_w)
    out = x.new_empty(tokens, rows)
    sums = out if parts == 1 else x.new_empty(parts, block_m, rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _by_value_kernel[block_m, tiles](
            x, by_value, tokens, weight.columns, tiles * block_w, x.stride(0),
            PER_WORD=constants["PER_WORD"], BLOCK_M=block_m, BLOCK_W=block_w, num_warps=1,
        )  # fmt: skip
        _few_rows_kernel[triton.cdiv(rows, block_n), parts](
            by_value, weight.words, weight.scales, x if bias is None else bias, sums,
            tokens, rows, weight.spec.groups(weight.columns), tiles * block_w, span * block_w,
            **constants, HAS_BIAS=bias is not None, SPLIT=parts > 1,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_W=block_w, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        if parts > 1:
            _sum_kernel[triton.cdiv(rows, 256), tokens](
                sums, x if bias is None else bias, out, rows,
                HAS_BIAS=bias is not None, PARTS=parts, BLOCK_M=block_m, BLOCK=256, num_warps=2,
            )  # fmt: skip
    return out


def dequantize(weight: PackedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``[start, stop)`` of the weight as a dense ``[rows, columns]``."""
    rows = (weight.rows if stop is None else stop) - start
    out = weight.scales.new_empty(rows, weight.columns)
    block_n, block_k = 4, 512
    with torch.cuda.device_of(out):
        _dequantize_kernel[triton.cdiv(rows, block_n), triton.cdiv(weight.columns, block_k)](
            weight.words, weight.scales, out, start, rows, weight.rows, weight.columns,
            weight.spec.groups(weight.columns), **_constants(weight), BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _constants(weight: PackedWeight) -> dict[str, Any]:
    # the kernels compute addresses themselves
    assert weight.words.is_contiguous()
    assert weight.scales.is_contiguous()
    per_word = values_per_word(weight.spec.bits)
    return {
        "BITS": weight.spec.bits,
        "PER_WORD": per_word,
        "GROUP_WORDS": weight.spec.group // per_word,
        "TRANSPOSED": weight.transposed,
    }
