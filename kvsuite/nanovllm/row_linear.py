"""Products of a few rows with a large weight, at the speed at which the weight can be read. Importing needs triton.

A decode step multiplies at most some hundred rows with every weight of the model, so a product takes as long as reading the
weight. The tensor cores want 64 rows on one side: that is the weight's side here, and the few rows are the other one. The
inner dimension can be cut (``splits``) so that there are about as many programs as the device runs at once; the partial sums
are added by whatever kernel reads the product next (`row_linear`), or by the last of the programs that share them, which adds
them to the residual and begins the next RMS norm (`add_linear`). Before a program waits for the kernel that makes its input
it fetches the beginning of its weights into the L2 cache.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.language.extra.cuda import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)

from .fused_kernels import launch_options

#: rows up to which the kernel is tried; above, a product is bound by arithmetic and torch's own is best
MOST_ROWS = 128


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Parameters
    ----------
    block_n, parts
        A program makes ``block_n * parts`` outputs of every row, ``block_n`` at a time.
    block_k
        Inputs a step.
    splits
        Programs that share one sum.
    warps, stages
        Warps of a program; steps whose loads are under way.
    prefetch
        128-byte lines of each weight row that are fetched before the input is ready.
    """

    block_n: int = 64
    parts: int = 1
    block_k: int = 64
    splits: int = 1
    warps: int = 4
    stages: int = 4
    prefetch: int = 4

    def fits(self, features: int, width: int, gated: bool) -> bool:
        """Whether a weight ``[features, width]`` (twice ``features`` rows if ``gated``) can be cut so."""
        whole = width % (self.block_k * self.splits) == 0 and features >= self.block_n * self.parts
        return whole and not (gated and self.splits > 1) and width // self.splits >= 64 * self.prefetch

    def tiles(self, features: int) -> int:
        """Programs a part of the inner dimension, for a weight of so many rows."""
        return -(-features // (self.block_n * self.parts))


# a batch size must not cost a compilation
@triton.jit(do_not_specialize=["rows"])
def _row_linear_kernel(
    x,
    squares,
    weight,
    out,
    residual,
    next_norm,
    next_weighed,
    next_squares,
    arrivals,
    rows,
    features,
    width,
    span,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    TILES_ABOVE: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    dtype = x.dtype.element_ty
    lanes = tl.arange(0, BLOCK_N)
    # a gated part holds outputs of the gate and, behind them, the same ones of the other projection
    made: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    inner = lanes % made
    shift = (lanes // made) * features
    start = tile * (made * PARTS)
    # rows behind the end read the first row and store nothing
    n0 = start + inner
    n1 = start + made + inner
    n2 = start + 2 * made + inner
    w0 = weight + (tl.where(n0 < features, n0, 0) + shift).to(tl.int64)[:, None] * width + split * span
    w1 = weight + (tl.where(n1 < features, n1, 0) + shift).to(tl.int64)[:, None] * width + split * span
    w2 = weight + (tl.where(n2 < features, n2, 0) + shift).to(tl.int64)[:, None] * width + split * span
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            lines = (tl.arange(0, PREFETCH) * 64)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [(w0 + lines).to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
            if PARTS > 1:
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                    "=r,l",
                    [(w1 + lines).to(tl.int64)],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
            if PARTS > 2:
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                    "=r,l",
                    [(w2 + lines).to(tl.int64)],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
        gdc_wait()
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    present = (m < rows)[None, :]
    if TILES > 0:
        # asked for here, needed behind the sum
        tiles = tl.arange(0, TILES_ABOVE)
        found = tl.load(
            squares + tiles[:, None] * rows + m[None, :], mask=present & (tiles < TILES)[:, None], other=0.0
        )
    if ADDED:
        places = m.to(tl.int64)[None, :] * features + n0[:, None]
        owned = present & (n0 < features)[:, None]
        before = tl.load(residual + places, mask=owned, other=0.0)
        scale = tl.load(next_norm + n0, mask=n0 < features, other=0.0)
    columns = x + m[None, :] * width + split * span + k[:, None]
    acc0 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc2 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for at in range(0, span, BLOCK_K):
        inputs = tl.load(columns + at, mask=present, other=0.0)
        acc0 = tl.dot(tl.load(w0 + (at + k)[None, :]), inputs, acc0, input_precision="ieee")
        if PARTS > 1:
            acc1 = tl.dot(tl.load(w1 + (at + k)[None, :]), inputs, acc1, input_precision="ieee")
        if PARTS > 2:
            acc2 = tl.dot(tl.load(w2 + (at + k)[None, :]), inputs, acc2, input_precision="ieee")
    if TILES > 0:
        factor = tl.rsqrt(tl.sum(found, axis=0) + eps)[None, :]
        acc0 *= factor
        acc1 *= factor
        acc2 *= factor
    if ADDED:
        last = True
        if SPLITS > 1:
            _store(acc0, out, start, split, rows, features, m, BLOCK_N, BLOCK_M, GATED, dtype)
            # what all threads of this program stored comes before its arrival
            tl.debug_barrier()
            last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(arrivals + tile, 0)
                # in the same order whoever is last
                acc0 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                for part in tl.static_range(SPLITS):
                    acc0 += tl.load(
                        out + part * rows.to(tl.int64) * features + places, mask=owned, other=0.0, cache_modifier=".cg"
                    )
            after = (before.to(tl.float32) + acc0.to(dtype).to(tl.float32)).to(dtype)
            tl.store(residual + places, after, mask=owned)
            # what lies behind the end was made of the first row of the weight
            wide = tl.where(owned, after.to(tl.float32), 0.0)
            tl.store(next_weighed + places, (wide * scale.to(tl.float32)[:, None]).to(dtype), mask=owned)
            tl.store(next_squares + tile * rows + m, tl.sum(wide * wide, axis=0) / features, mask=m < rows)
    else:
        _store(acc0, out, start, split, rows, features, m, BLOCK_N, BLOCK_M, GATED, dtype)
        if PARTS > 1:
            _store(acc1, out, start + made, split, rows, features, m, BLOCK_N, BLOCK_M, GATED, dtype)
        if PARTS > 2:
            _store(acc2, out, start + 2 * made, split, rows, features, m, BLOCK_N, BLOCK_M, GATED, dtype)


@triton.jit
def _store(
    acc,
    out,
    start,
    split,
    rows,
    features,
    m,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GATED: tl.constexpr,
    dtype: tl.constexpr,
):
    made: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, made, BLOCK_M)), (1, 2, 0)))
        gate = gate.to(dtype).to(tl.float32)
        active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = active * up.to(dtype).to(tl.float32)
    else:
        result = acc
    n = start + tl.arange(0, made)
    target = out + (split * rows + m).to(tl.int64)[None, :] * features + n[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < features)[:, None])


def row_linear(
    x: Tensor,
    weight: Tensor,
    tiling: Tiling,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> Tensor:
    """Return ``x @ weight.T`` as partial sums ``[splits, T, features]``.

    Parameters
    ----------
    x
        ``[T, width]``, contiguous, at most `MOST_ROWS` rows.
    weight
        ``[features, width]``, contiguous; if ``gated`` the gates' rows, then those of the other projection, and the result
        is ``silu(gate) * other``.
    tiling
        One that fits.
    squares
        float32 ``[tiles, T]``, what `add_linear` returns beside ``x``: the result is that of ``x`` over the root of their
        sum, which makes it the product of the RMS norm.
    eps
        Added to the mean square.
    gated
        See ``weight``.
    dtype
        Of the result if it has one part; that of ``x`` by default. Several are in float32.
    pdl
        Whether neighbours in the stream may overlap.
    """
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    made = torch.float32 if tiling.splits > 1 else dtype or x.dtype
    out = torch.empty(tiling.splits, x.shape[0], features, dtype=made, device=x.device)
    _launch(x, squares, weight, out, None, tiling, features, eps, gated, pdl)
    return out


def add_linear(
    x: Tensor,
    weight: Tensor,
    tiling: Tiling,
    residual: Tensor,
    norm: Tensor,
    arrivals: Tensor,
    *,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add ``x @ weight.T`` to ``residual`` in place, and return what the product behind the next RMS norm reads.

    Parameters
    ----------
    x, weight, tiling, pdl
        See `row_linear`; the tiling has one part.
    residual
        ``[T, features]``, contiguous, overwritten.
    norm
        ``[features]``, weights of the norm.
    arrivals
        int32, one for each tile, all 0, and 0 again at the end: how many of the programs that share a sum are done. The
        last one adds.

    Returns
    -------
    Tensor
        ``[T, features]``: the new residual times ``norm``.
    Tensor
        float32 ``[tiles, T]``: what each tile adds to the mean square of the new residual.
    """
    assert tiling.parts == 1
    rows, features = residual.shape
    parts = tiling.splits if tiling.splits > 1 else 0
    out = torch.empty(parts, rows, features, dtype=torch.float32, device=x.device)
    weighed = torch.empty_like(residual)
    squares = torch.empty(tiling.tiles(features), rows, dtype=torch.float32, device=x.device)
    _launch(x, None, weight, out, (residual, norm, weighed, squares, arrivals), tiling, features, 0.0, False, pdl)
    return weighed, squares


def _launch(
    x: Tensor,
    squares: Tensor | None,
    weight: Tensor,
    out: Tensor,
    added: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None,
    tiling: Tiling,
    features: int,
    eps: float,
    gated: bool,
    pdl: bool,
) -> None:
    rows, width = x.shape
    tiles = 0 if squares is None else squares.shape[0]
    _row_linear_kernel[(tiling.tiles(2 * features if gated else features), tiling.splits)](
        x,
        x if squares is None else squares,
        weight,
        out,
        *(added or (x, x, x, x, x)),
        rows,
        features,
        width,
        width // tiling.splits,
        eps,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=tiling.block_n,
        PARTS=tiling.parts,
        BLOCK_K=tiling.block_k,
        SPLITS=tiling.splits,
        TILES=tiles,
        TILES_ABOVE=triton.next_power_of_2(max(tiles, 1)),
        GATED=gated,
        ADDED=added is not None,
        PREFETCH=tiling.prefetch,
        PDL=pdl,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **launch_options(pdl),
    )


def seconds_per_product(
    weights: Sequence[Tensor],
    rows: int,
    tiling: Tiling | None,
    *,
    gated: bool = False,
    pdl: bool = True,
    repeats: int = 5,
) -> float:
    """Median seconds of one product with ``rows`` rows, in a CUDA graph over all ``weights``; ``None``: torch's product.

    There should be so many weights that the caches do not hold them.
    """
    first = weights[0]
    x = torch.randn(rows, first.shape[1], dtype=first.dtype, device=first.device)

    def once() -> None:
        for weight in weights:
            if tiling is None:
                torch.nn.functional.linear(x, weight)
            else:
                row_linear(x, weight, tiling, gated=gated, pdl=pdl)

    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    times: list[float] = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[len(times) // 2] / 1000 / len(weights)
