"""What surrounds attention in a decoder layer, each as one Triton kernel. Importing this module needs triton.

Intermediate results are rounded where transformers' modules round them, so a fused layer differs from theirs by the order
of sums alone. A product may arrive as several partial sums (`row_linear`); whatever reads it adds them.

Every kernel can take part in programmatic dependent launch (``pdl``): it lets the next kernel start early and itself waits
for the one before, after it has fetched what does not depend on that one. ``rows`` is not specialised: a batch size must not
cost a compilation.

What is written into packed pages is packed on the way (`packed_vectors`), with the very bits of the reference.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.language.extra.cuda import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from .layer_pages import LayerPages
from .packed_vectors import EXACT, side_options, store_vectors


def launch_options(pdl: bool) -> dict[str, Any]:
    """Options of a launch: an attribute of the launch has to go with what the kernel was compiled for."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def sum_of_parts(base, offsets, mask, part_stride, SPLITS: tl.constexpr, dtype: tl.constexpr, factor=1.0):
    total = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(base + part * part_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    return (total * factor).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    delta,
    residual,
    weight,
    out,
    rows,
    width,
    eps,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    dtype = out.dtype.element_ty
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(residual + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        part_stride = rows.to(tl.int64) * width
        added = sum_of_parts(delta + row * width, columns, inside, part_stride, SPLITS, dtype)
        x = (x + added).to(dtype)
        tl.store(residual + row * width + columns, x, mask=inside)
        x = x.to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / width
    normed = (x * tl.rsqrt(mean_square + eps)).to(dtype).to(tl.float32)
    tl.store(out + row * width + columns, (normed * scale).to(dtype), mask=inside)


def add_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """Add ``delta`` to ``residual`` in place, and return the RMS norm of the sum times ``weight``.

    Parameters
    ----------
    delta
        Partial sums ``[parts, T, width]``; ``None`` adds nothing.
    residual
        ``[T, width]``, overwritten.
    weight
        ``[width]``.
    eps
        Added to the mean square.
    pdl
        Whether neighbours in the stream may overlap.
    """
    rows, width = residual.shape
    out = torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(rows,)](
        residual if delta is None else delta,
        residual,
        weight,
        out,
        rows,
        width,
        eps,
        SPLITS=0 if delta is None else delta.shape[0],
        BLOCK=block,
        PDL=pdl,
        num_warps=8 if block >= 2048 else 4,
        **launch_options(pdl),
    )
    return out


@triton.jit(do_not_specialize=["rows", "counters"])
def _open_residual_kernel(
    ids,
    embedding,
    weight,
    residual,
    weighed,
    squares,
    arrivals,
    rows,
    width,
    counters,
    TILES: tl.constexpr,
    TILES_ABOVE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(embedding + tl.load(ids + row) * width + columns, mask=inside, other=0.0)
    tl.store(residual + row * width + columns, x, mask=inside)
    wide = x.to(tl.float32)
    tl.store(weighed + row * width + columns, (wide * scale).to(x.dtype), mask=inside)
    tiles = tl.arange(0, TILES_ABOVE)
    total = tl.sum(wide * wide, axis=0) / width
    tl.store(squares + tiles * rows + row, tl.where(tiles == 0, total, 0.0), mask=tiles < TILES)
    for at in range(row * BLOCK, counters, tl.num_programs(0) * BLOCK):
        tl.store(arrivals + at + columns, tl.zeros((BLOCK,), tl.int32), mask=at + columns < counters)


def open_residual(
    ids: Tensor, embedding: Tensor, norm: Tensor, tiles: int, arrivals: int, *, pdl: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residuals of tokens at the first layer, in the form that `row_linear.add_linear` keeps up.

    Parameters
    ----------
    ids
        int64 ``[T]``.
    embedding
        ``[vocab, width]``.
    norm
        ``[width]``, weights of the first layer's norm.
    tiles
        Into how many shares their mean squares are cut, so that every layer reads as many.
    arrivals
        Counters.
    pdl
        Whether neighbours in the stream may overlap.

    Returns
    -------
    Tensor
        ``[T, width]``: residuals.
    Tensor
        ``[T, width]``: residuals times ``norm``.
    Tensor
        float32 ``[tiles, T]``: shares of the mean squares of residuals.
    Tensor
        int32 ``[arrivals]``: zeros.
    """
    rows, width = ids.shape[0], embedding.shape[1]
    residual, weighed = (embedding.new_empty(rows, width) for _ in range(2))
    squares = torch.empty(tiles, rows, dtype=torch.float32, device=ids.device)
    zeros = torch.empty(arrivals, dtype=torch.int32, device=ids.device)
    block = triton.next_power_of_2(width)
    _open_residual_kernel[(rows,)](
        ids,
        embedding,
        norm,
        residual,
        weighed,
        squares,
        zeros,
        rows,
        width,
        arrivals,
        TILES=tiles,
        TILES_ABOVE=triton.next_power_of_2(tiles),
        BLOCK=block,
        PDL=pdl,
        num_warps=8 if block >= 2048 else 4,
        **launch_options(pdl),
    )
    return residual, weighed, squares, zeros


@triton.jit
def _store_halves(
    low,
    high,
    codes,
    scales,
    refused,
    rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUMBER: tl.constexpr,
    NUMBERS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Write head vectors, of which the halves ``[HEADS, HEAD_DIM / 2]`` come apart, as head vectors ``rows`` of pages."""
    half: tl.constexpr = HEAD_DIM // 2
    if NUMBER == "auto":
        target = codes + rows[:, None] * HEAD_DIM + tl.arange(0, half)[None, :]
        tl.store(target, low)
        tl.store(target + half, high)
    else:
        whole = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (HEADS, HEAD_DIM)).to(tl.float32)
        store_vectors(
            whole, codes, scales, refused, rows, rows >= 0, HEADS, HEAD_DIM, NUMBER, NUMBERS, ELEMENTS, ROTATED
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _rotate_store_kernel(
    qkv,
    positions,
    slots,
    cosines,
    sines,
    query_weight,
    key_weight,
    query_out,
    keys,
    key_scales,
    key_refused,
    values,
    value_scales,
    value_refused,
    rows,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    KEY: tl.constexpr,
    KEY_NUMBERS: tl.constexpr,
    KEY_ELEMENTS: tl.constexpr,
    KEY_ROTATED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_NUMBERS: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    VALUE_ROTATED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    half: tl.constexpr = HEAD_DIM // 2
    width: tl.constexpr = (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM
    lanes = tl.arange(0, half)
    members = tl.arange(0, HEADS)
    dtype = query_out.dtype.element_ty
    # where a token stands and goes was known before the step began
    position = tl.load(positions + row)
    slot = tl.load(slots + row)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part_stride = rows.to(tl.int64) * width
    offsets = (first + members[:, None]) * HEAD_DIM + lanes[None, :]
    base = qkv + row * width
    low = sum_of_parts(base, offsets, offsets >= 0, part_stride, SPLITS, dtype)
    high = sum_of_parts(base + half, offsets, offsets >= 0, part_stride, SPLITS, dtype)
    if first < QUERY_HEADS + KV_HEADS:
        if NORM:
            weight = key_weight
            if first < QUERY_HEADS:
                weight = query_weight
            mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / HEAD_DIM
            factor = tl.rsqrt(mean_square + eps)[:, None]
            weight_low = tl.load(weight + lanes).to(tl.float32)[None, :]
            weight_high = tl.load(weight + half + lanes).to(tl.float32)[None, :]
            low = ((low * factor).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
            high = ((high * factor).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
        cosine = tl.load(cosines + position * half + lanes).to(tl.float32)[None, :]
        sine = tl.load(sines + position * half + lanes).to(tl.float32)[None, :]
        turned_low = (low * cosine).to(dtype).to(tl.float32) - (high * sine).to(dtype).to(tl.float32)
        turned_high = (high * cosine).to(dtype).to(tl.float32) + (low * sine).to(dtype).to(tl.float32)
        if first < QUERY_HEADS:
            target = query_out + row * (QUERY_HEADS * HEAD_DIM) + offsets
            tl.store(target, turned_low.to(dtype))
            tl.store(target + half, turned_high.to(dtype))
        else:
            _store_halves(
                turned_low.to(dtype), turned_high.to(dtype), keys, key_scales, key_refused,
                slot * KV_HEADS + first - QUERY_HEADS + members,
                HEADS, HEAD_DIM, KEY, KEY_NUMBERS, KEY_ELEMENTS, KEY_ROTATED,
            )  # fmt: skip
    else:
        _store_halves(
            low.to(dtype), high.to(dtype), values, value_scales, value_refused,
            slot * KV_HEADS + first - QUERY_HEADS - KV_HEADS + members,
            HEADS, HEAD_DIM, VALUE, VALUE_NUMBERS, VALUE_ELEMENTS, VALUE_ROTATED,
        )  # fmt: skip


def rotate_store(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    table: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: LayerPages,
    values: LayerPages,
    *,
    query_heads: int,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Norm and rotate queries and keys; write keys and values to their slots; return queries ``[T, heads, head_dim]``.

    Queries come back unrotated by any ``+hadamard``, which is a matter of the pages.

    Parameters
    ----------
    qkv
        Partial sums ``[parts, T, (heads + 2 kv_heads) * head_dim]``.
    positions, slots
        int64 ``[T]``.
    table
        Cosines and sines, each ``[positions, head_dim / 2]``.
    norms
        Weights ``[head_dim]`` of the RMS norms of a query's and a key's head; ``None`` for models without.
    eps
        Of these norms.
    keys, values
        The layer's pages.
    query_heads
        Heads of the queries.
    out
        Where they are written, contiguous, if given.
    pdl
        Whether neighbours in the stream may overlap.
    """
    parts, rows, _ = qkv.shape
    kv_heads, head_dim = keys.codes.shape[-2], 2 * table[0].shape[-1]
    packed = keys.side.is_packed or values.side.is_packed
    if out is None:
        out = torch.empty(rows, query_heads, head_dim, dtype=table[0].dtype, device=qkv.device)
    # a program's heads are all of one kind
    heads = 1
    while heads < 8 and query_heads % (2 * heads) == 0 and kv_heads % (2 * heads) == 0:
        heads *= 2
    weights = norms or (table[0], table[0])
    _rotate_store_kernel[(rows, (query_heads + 2 * kv_heads) // heads)](
        qkv,
        positions,
        slots,
        table[0],
        table[1],
        weights[0],
        weights[1],
        out,
        keys.codes,
        keys.scales,
        keys.refused.view(torch.uint8),
        values.codes,
        values.scales,
        values.refused.view(torch.uint8),
        rows,
        eps,
        QUERY_HEADS=query_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEADS=heads,
        SPLITS=parts,
        NORM=norms is not None,
        PDL=pdl,
        **side_options(keys.side, head_dim, "KEY"),
        **side_options(values.side, head_dim, "VALUE"),
        num_warps=2,
        **launch_options(pdl),
        **(EXACT if packed else {}),
    )
    return out


@triton.jit(do_not_specialize=["rows"])
def _silu_mul_kernel(gate_up, out, rows, width, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dtype = out.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part_stride = rows.to(tl.int64) * width * 2
    base = gate_up + row * width * 2
    gate = sum_of_parts(base, columns, inside, part_stride, SPLITS, dtype)
    up = sum_of_parts(base + width, columns, inside, part_stride, SPLITS, dtype)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + columns, (active * up).to(dtype), mask=inside)


def silu_mul(gate_up: Tensor, dtype: torch.dtype, *, pdl: bool = False) -> Tensor:
    """``silu(gate) * up`` ``[T, width]`` of partial sums ``[parts, T, 2 * width]``, gates first."""
    parts, rows, both = gate_up.shape
    width = both // 2
    out = torch.empty(rows, width, dtype=dtype, device=gate_up.device)
    block = min(2048 if rows > 128 else 1024, triton.next_power_of_2(width))
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](
        gate_up,
        out,
        rows,
        width,
        SPLITS=parts,
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out
