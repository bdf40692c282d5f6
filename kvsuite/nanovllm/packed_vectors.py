"""Head vectors to packed pages and back, with the bits of `kvsuite.cache_formats.pack`. Importing this module needs triton.

Equal bits need what that reference does: float32 throughout, divisions rounded to nearest, and no product fused with a sum.
So every kernel that uses these functions is launched with `EXACT`.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from kvsuite.cache_formats.cache_format import SideFormat

from .layer_pages import LayerPages

#: options of a launch without which bits differ
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
# what adding and subtracting rounds to whole numbers, halves to even ones
_ROUNDING = tl.constexpr(12582912.0)


def side_options(side: SideFormat, head_dim: int, name: str) -> dict[str, Any]:
    """What kernels have to know of keys or values, as parameters that begin with ``name``.

    The number format, the float16 numbers and the elements of a group, and whether vectors are rotated.
    """
    return {
        name: side.number,
        f"{name}_NUMBERS": side.numbers_of_group if side.is_packed else 0,
        f"{name}_ELEMENTS": side.group or head_dim,
        f"{name}_ROTATED": side.hadamard,
    }


@triton.jit
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Rotate vectors ``[ROWS, SIZE]``: butterflies of distance 1, 2, 4, ... and one product, in this order."""
    for stage in tl.static_range(10):
        if 2**stage < SIZE:
            pairs = tl.reshape(x, (ROWS, SIZE // 2 ** (stage + 1), 2, 2**stage))
            a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, SIZE))
    return x * (SIZE**-0.5)


@triton.jit
def hadamard_signs(first, second):
    """Entries of Sylvester's matrix: -1 where the indices have an odd number of ones in common, else 1; float32."""
    common = first & second
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 1.0 - 2.0 * (common & 1).to(tl.float32)


@triton.jit
def _float16_up(x):
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    return tl.where(near.to(tl.float32) < x, bits + 1, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _float16_down(x):
    near = x.to(tl.float16)
    bits = near.to(tl.int16, bitcast=True)
    # below zero of either sign comes the least negative number
    lower = tl.where(near > 0, bits - 1, tl.where(near == 0, -32767, bits + 1))
    return tl.where(near.to(tl.float32) > x, lower, bits).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _divided(x, scale):
    wide = scale.to(tl.float32)
    # a scale of 0 has only zeros above it
    return tl.where(wide == 0, 0.0, tl.div_rn(x, tl.broadcast_to(tl.where(wide == 0, 1.0, wide), x.shape)))


@triton.jit
def store_vectors(
    x,
    codes,
    scales,
    refused,
    rows,
    valid,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUMBER: tl.constexpr,
    NUMBERS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Pack float32 vectors ``[ROWS, HEAD_DIM]`` and write them as head vectors ``rows`` of codes and scales.

    ``refused`` becomes 1 where a number is not finite, or larger than float16 scales reach.
    """
    lanes = tl.arange(0, HEAD_DIM)
    if NUMBER == "auto":
        tl.store(codes + rows[:, None] * HEAD_DIM + lanes[None, :], x.to(codes.dtype.element_ty), mask=valid[:, None])
    else:
        GROUPS: tl.constexpr = HEAD_DIM // ELEMENTS
        # what is no number compares with nothing
        wrong = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1)
        if ROTATED:
            x = hadamard(x, ROWS, HEAD_DIM)
        grouped = tl.reshape(x, (ROWS, GROUPS, ELEMENTS))
        at = scales + (rows[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]) * NUMBERS
        if NUMBER == "int4":
            least = _float16_down(tl.min(grouped, axis=2))
            room = tl.max(grouped, axis=2) - least.to(tl.float32)
            scale = _float16_up(tl.div_rn(room, tl.full(room.shape, 15.0, tl.float32)))
            reach = tl.maximum(scale.to(tl.float32), -least.to(tl.float32))
            levels = _divided(grouped - least.to(tl.float32)[:, :, None], scale[:, :, None])
            levels = tl.minimum(tl.maximum((levels + _ROUNDING) - _ROUNDING, 0.0), 15.0)
            low, high = tl.split(tl.reshape(levels.to(tl.uint8), (ROWS, HEAD_DIM // 2, 2)))
            halves = tl.arange(0, HEAD_DIM // 2)
            packed = low | (high << 4)
            tl.store(codes + rows[:, None] * (HEAD_DIM // 2) + halves[None, :], packed, mask=valid[:, None])
            tl.store(at, scale, mask=valid[:, None])
            tl.store(at + 1, least, mask=valid[:, None])
        else:
            largest = tl.max(tl.abs(grouped), axis=2)
            if NUMBERS == 1:
                limit: tl.constexpr = 127.0 if NUMBER == "int8" else 448.0
                scale = _float16_up(tl.div_rn(largest, tl.full(largest.shape, limit, tl.float32)))
                reach = scale.to(tl.float32)
                levels = tl.reshape(_divided(grouped, scale[:, :, None]), (ROWS, HEAD_DIM))
                tl.store(at, scale, mask=valid[:, None])
            else:
                levels = x
            if NUMBER == "int8":
                levels = tl.minimum(tl.maximum((levels + _ROUNDING) - _ROUNDING, -127.0), 127.0)
                found = levels.to(tl.int8).to(tl.uint8, bitcast=True)
            else:
                levels = tl.minimum(tl.maximum(levels, -448.0), 448.0)
                found = levels.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            tl.store(codes + rows[:, None] * HEAD_DIM + lanes[None, :], found, mask=valid[:, None])
        if NUMBERS > 0:
            wrong = tl.maximum(wrong, tl.max(tl.where(reach < float("inf"), 0, 1), axis=1))
        tl.store(refused + rows * 0, wrong.to(refused.dtype.element_ty), mask=valid & (wrong != 0))


@triton.jit
def load_vectors(
    codes,
    scales,
    rows,
    valid,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUMBER: tl.constexpr,
    NUMBERS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Read head vectors ``rows`` of codes and scales and unpack them, float32 ``[ROWS, HEAD_DIM]``."""
    lanes = tl.arange(0, HEAD_DIM)
    if NUMBER == "auto":
        x = tl.load(codes + rows[:, None] * HEAD_DIM + lanes[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    else:
        GROUPS: tl.constexpr = HEAD_DIM // ELEMENTS
        if NUMBER == "int4":
            halves = tl.arange(0, HEAD_DIM // 2)
            packed = tl.load(codes + rows[:, None] * (HEAD_DIM // 2) + halves[None, :], mask=valid[:, None], other=0)
            x = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, HEAD_DIM)).to(tl.float32)
        else:
            packed = tl.load(codes + rows[:, None] * HEAD_DIM + lanes[None, :], mask=valid[:, None], other=0)
            if NUMBER == "int8":
                x = packed.to(tl.int8, bitcast=True).to(tl.float32)
            else:
                x = packed.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        if NUMBERS > 0:
            at = scales + (rows[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]) * NUMBERS
            grouped = tl.reshape(x, (ROWS, GROUPS, ELEMENTS))
            grouped *= tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)[:, :, None]
            if NUMBERS == 2:
                grouped += tl.load(at + 1, mask=valid[:, None], other=0.0).to(tl.float32)[:, :, None]
            x = tl.reshape(grouped, (ROWS, HEAD_DIM))
        if ROTATED:
            x = hadamard(x, ROWS, HEAD_DIM)
    return x


_VECTORS = 8


@triton.jit(do_not_specialize=["count"])
def _store_kernel(
    vectors,
    slots,
    codes,
    scales,
    refused,
    count,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    SIDE_NUMBERS: tl.constexpr,
    SIDE_ELEMENTS: tl.constexpr,
    SIDE_ROTATED: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = own < count
    lanes = tl.arange(0, HEAD_DIM)
    x = tl.load(vectors + own[:, None] * HEAD_DIM + lanes[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
    rows = tl.load(slots + own // KV_HEADS, mask=valid, other=0) * KV_HEADS + own % KV_HEADS
    store_vectors(
        x, codes, scales, refused, rows, valid, ROWS, HEAD_DIM, SIDE, SIDE_NUMBERS, SIDE_ELEMENTS, SIDE_ROTATED
    )


def store_packed(vectors: Tensor, slots: Tensor, pages: LayerPages) -> None:
    """Pack head vectors ``[T, kv_heads, head_dim]``, contiguous, and write them to their slots, int64 ``[T]``."""
    tokens, kv_heads, head_dim = vectors.shape
    count = tokens * kv_heads
    _store_kernel[(triton.cdiv(count, _VECTORS),)](
        vectors, slots, pages.codes, pages.scales, pages.refused.view(torch.uint8), count, KV_HEADS=kv_heads,
        HEAD_DIM=head_dim, ROWS=_VECTORS, **side_options(pages.side, head_dim, "SIDE"), num_warps=2, **EXACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _unpack_kernel(
    codes,
    scales,
    blocks,
    out,
    count,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    SIDE_NUMBERS: tl.constexpr,
    SIDE_ELEMENTS: tl.constexpr,
    SIDE_ROTATED: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = own < count
    rows = tl.load(blocks + own // BLOCK, mask=valid, other=0).to(tl.int64) * BLOCK + own % BLOCK
    x = load_vectors(codes, scales, rows, valid, ROWS, HEAD_DIM, SIDE, SIDE_NUMBERS, SIDE_ELEMENTS, SIDE_ROTATED)
    lanes = tl.arange(0, HEAD_DIM)
    tl.store(out + own[:, None] * HEAD_DIM + lanes[None, :], x.to(out.dtype.element_ty), mask=valid[:, None])


def unpack_pages(pages: LayerPages, blocks: Tensor, out: Tensor) -> None:
    """Unpack whole blocks, one behind the other, rounded once to the dtype of ``out``.

    Parameters
    ----------
    pages
        The layer's keys, or values.
    blocks
        int32 or int64 ``[n]``.
    out
        ``[n, block_size, kv_heads, head_dim]``, contiguous, overwritten.
    """
    count, block_size, kv_heads, head_dim = out.shape
    vectors = count * block_size * kv_heads
    if vectors:
        _unpack_kernel[(triton.cdiv(vectors, _VECTORS),)](
            pages.codes, pages.scales, blocks, out, vectors, BLOCK=block_size * kv_heads, HEAD_DIM=head_dim, ROWS=_VECTORS,
            **side_options(pages.side, head_dim, "SIDE"), num_warps=2, **EXACT,
        )  # fmt: skip
