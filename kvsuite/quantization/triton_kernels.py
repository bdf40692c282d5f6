"""Products with packed weights on CUDA. Importing this module needs triton.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.nn import functional as F

from .formats import values_per_word

if TYPE_CHECKING:
    from .modules import PackedWeight

#: tokens up to which the product reads the packed words itself; above, tiles are dequantised for torch's matmul
FEW_ROWS = 64
# elements of a tile that is dequantised for torch's matmul
_TILE = 1 << 26


@triton.jit
def _one_row_kernel(
    x, words, scales, bias, out,
    rows, columns, row_words,
    x_stride, word_row, word_column, scale_row, scale_column, out_stride,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, GROUP_WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """``out[token, n] = sum_k (stored[n, k] - m) * scale * x[token, k]`` in float32, one token a program."""
    HALF: tl.constexpr = PER_WORD // 2
    MASK: tl.constexpr = (1 << BITS) - 1
    MAXIMUM: tl.constexpr = (1 << (BITS - 1)) - 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1)
    live_n = n < rows
    word_rows = words + n.to(tl.int64)[:, None] * word_row
    scale_rows = scales + n.to(tl.int64)[:, None] * scale_row
    total = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
    for start in range(0, row_words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        live = live_n[:, None] & (w < row_words)[None, :]
        packed = tl.load(word_rows + w[None, :] * word_column, mask=live, other=0)
        scale = tl.load(scale_rows + (w // GROUP_WORDS)[None, :] * scale_column, mask=live, other=0.0)
        part = tl.zeros((BLOCK_N, BLOCK_W), dtype=tl.float32)
        for i in tl.static_range(PER_WORD):
            k = w * PER_WORD + i
            value = tl.load(x + token * x_stride + k, mask=k < columns, other=0.0).to(tl.float32)
            # the bits of the value, in place, are the low mantissa of 2^23 + stored * 2^p: an integer-to-float
            # conversion without the (slow) instruction; x takes the factor 2^-p, and both steps are exact
            raw = ((packed >> ((i // HALF) * HALF * BITS)) & (MASK << ((i % HALF) * BITS))) | 0x4B000000
            level = raw.to(tl.float32, bitcast=True) - (8388608.0 + (MAXIMUM << ((i % HALF) * BITS)))
            part += level * (value * (1.0 / (1 << ((i % HALF) * BITS))))[None, :]
        total += part * scale.to(tl.float32)
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + n, result.to(out.dtype.element_ty), mask=live_n)


@triton.jit
def _few_rows_kernel(
    x, words, scales, bias, out,
    tokens, rows, columns, row_words,
    x_stride, word_row, word_column, scale_row, scale_column, out_stride,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, GROUP_WORDS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """All tokens at once: value i of every word of a tile makes one matrix product of depth BLOCK_W."""
    MASK: tl.constexpr = (1 << BITS) - 1
    MAXIMUM: tl.constexpr = (1 << (BITS - 1)) - 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    live_n = n < rows
    live_m = m < tokens
    word_rows = words + n.to(tl.int64)[:, None] * word_row
    scale_rows = scales + n.to(tl.int64)[:, None] * scale_row
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, row_words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        live = live_n[:, None] & (w < row_words)[None, :]
        packed = tl.load(word_rows + w[None, :] * word_column, mask=live, other=0)
        scale = tl.load(scale_rows + (w // GROUP_WORDS)[None, :] * scale_column, mask=live, other=0.0)
        for i in tl.static_range(PER_WORD):
            k = w * PER_WORD + i
            value = tl.load(
                x + m[None, :] * x_stride + k[:, None], mask=(k < columns)[:, None] & live_m[None, :], other=0.0
            )
            level = ((packed >> (i * BITS)) & MASK) - MAXIMUM
            total = tl.dot(level.to(scale.dtype) * scale, value, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + m[None, :] * out_stride + n[:, None],
        total.to(out.dtype.element_ty),
        mask=live_n[:, None] & live_m[None, :],
    )


@triton.jit
def _dequantize_kernel(
    words, scales, out,
    first, rows, columns,
    word_row, word_column, scale_row, scale_column,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``first ... first + rows`` as a dense row-major matrix, bit for bit those of `dequantize_groups`."""
    MASK: tl.constexpr = (1 << BITS) - 1
    MAXIMUM: tl.constexpr = (1 << (BITS - 1)) - 1
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = (n < rows)[:, None] & (k < columns)[None, :]
    source = (first + n).to(tl.int64)[:, None]
    packed = tl.load(words + source * word_row + (k // PER_WORD)[None, :] * word_column, mask=live, other=0)
    scale = tl.load(scales + source * scale_row + (k // GROUP)[None, :] * scale_column, mask=live, other=0.0)
    level = ((packed >> ((k % PER_WORD) * BITS)[None, :]) & MASK) - MAXIMUM
    tl.store(out + n.to(tl.int64)[:, None] * columns + k[None, :], level.to(scale.dtype) * scale, mask=live)


def group_matmul(x: Tensor, weight: "PackedWeight", bias: Tensor | None) -> Tensor:
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
        ``[tokens, rows]`` in the dtype of ``x``. One token takes the row kernel, up to `FEW_ROWS` the tensor cores, more
        dequantise a tile at a time for torch's matmul.
    """
    tokens = x.shape[0]
    if tokens == 1:
        return one_row_product(x, weight, bias)
    if tokens <= FEW_ROWS:
        return few_rows_product(x, weight, bias)
    step = max(1, _TILE // weight.columns)
    if step >= weight.rows:
        return F.linear(x, dequantize(weight), bias)
    out = x.new_empty(tokens, weight.rows)
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        out[:, start:stop] = F.linear(x, dequantize(weight, start, stop), None if bias is None else bias[start:stop])
    return out


def one_row_product(
    x: Tensor, weight: "PackedWeight", bias: Tensor | None, *, block_n: int = 8, block_w: int = 128, warps: int = 4
) -> Tensor:
    """The product on the ordinary cores, a program a token and ``block_n`` rows: for one token."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.rows)
    with torch.cuda.device_of(x):
        _one_row_kernel[triton.cdiv(weight.rows, block_n), x.shape[0]](
            x, weight.words, weight.scales, x if bias is None else bias, out,
            weight.rows, weight.columns, weight.spec.words(weight.columns), x.stride(0), *_strides(weight), out.stride(0),
            **_constants(weight), HAS_BIAS=bias is not None, BLOCK_N=block_n, BLOCK_W=block_w, num_warps=warps,
        )  # fmt: skip
    return out


def few_rows_product(
    x: Tensor, weight: "PackedWeight", bias: Tensor | None, *, block_n: int = 64, block_w: int = 32, warps: int = 4
) -> Tensor:
    """The product on the tensor cores for up to `FEW_ROWS` tokens: every word is read once."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.rows)
    with torch.cuda.device_of(x):
        _few_rows_kernel[(triton.cdiv(weight.rows, block_n),)](
            x, weight.words, weight.scales, x if bias is None else bias, out,
            x.shape[0], weight.rows, weight.columns, weight.spec.words(weight.columns),
            x.stride(0), *_strides(weight), out.stride(0),
            **_constants(weight), HAS_BIAS=bias is not None,
            BLOCK_M=max(16, triton.next_power_of_2(x.shape[0])), BLOCK_N=block_n, BLOCK_W=block_w,
            # one stage in flight: ten tiles of float32 activations a step would not fit shared memory twice
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out


def dequantize(weight: "PackedWeight", start: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``[start, stop)`` of the weight as a dense ``[rows, columns]``."""
    rows = (weight.rows if stop is None else stop) - start
    out = weight.scales.new_empty(rows, weight.columns)
    block_n, block_k = 4, 512
    with torch.cuda.device_of(out):
        _dequantize_kernel[triton.cdiv(rows, block_n), triton.cdiv(weight.columns, block_k)](
            weight.words, weight.scales, out, start, rows, weight.columns, *_strides(weight),
            BITS=weight.spec.bits, PER_WORD=values_per_word(weight.spec.bits), GROUP=weight.spec.group,
            BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return out


def _strides(weight: "PackedWeight") -> tuple[int, ...]:
    """Row and column strides of words and scales, columns along the input dimension."""
    strides = (*weight.words.stride(), *weight.scales.stride())
    return (strides[1], strides[0], strides[3], strides[2]) if weight.transposed else strides


def _constants(weight: "PackedWeight") -> dict[str, Any]:
    per_word = values_per_word(weight.spec.bits)
    return {"BITS": weight.spec.bits, "PER_WORD": per_word, "GROUP_WORDS": weight.spec.group // per_word}
