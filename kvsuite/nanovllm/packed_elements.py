"""Numbers of packed vectors from the 16-bit words that attention loads. Importing this module needs triton.

A word holds neighbouring codes, two of 8 bits or four of 4. A few instructions make float16 of the codes of two words at
once, exactly, and one load brings a token's scale and least value: attention over packed pages has to keep up with memory.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from .layer_pages import LayerPages


@triton.jit
def unpack_words(words, NUMBER: tl.constexpr, ASSEMBLY: tl.constexpr):
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
def load_numbers(scales, row, COUNT: tl.constexpr, PAIRED: tl.constexpr):
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
def scale_groups(
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


def words_of(pages: LayerPages) -> Tensor:
    """Packed codes by 16-bit words; what is not packed as it is."""
    return pages.codes.view(torch.int16) if pages.side.is_packed else pages.codes
