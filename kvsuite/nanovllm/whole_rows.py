"""Products of one row by programs that read whole rows of the weight. Importing needs triton.

One row needs no tensor cores, and programs that multiply and add a few rows of the weight each are enough to fill a device: no
sum is shared, and nobody waits for others before the residual and the next RMS norm (`row_linear` has more rows).

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

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

# rows of the weight that a program reads, inputs a step, bytes of each row that are fetched before the input is ready
_OUTPUTS, _BLOCK_K, _PREFETCH = 8, 512, 1024
_WARPS = 4


@dataclass(frozen=True)
class WholeRows:
    """How a product is read.

    Parameters
    ----------
    stages
        Steps whose loads are under way.
    held
        Programs that the shared memory of one of Hopper's SMs holds with so many.
    """

    stages: int
    held: int

    def tiles(self, features: int) -> int:
        """Programs for a weight of so many rows."""
        return -(-features // _OUTPUTS)

    def fills(self, features: int, processors: int) -> bool:
        """Whether they all run at once, and leave next to no place on ``processors`` SMs."""
        places = self.held * processors
        return 0.75 * places < self.tiles(features) <= places


#: for queries, keys and values, and for what is added to the residual: fastest for 6,144 and 4,096 features on an H200
PROJECTED, SUMMED = WholeRows(stages=5, held=6), WholeRows(stages=6, held=4)


@triton.jit
def _whole_rows_kernel(
    x,
    weight,
    out,
    next_norm,
    next_weighed,
    next_squares,
    features,
    width,
    ADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    dtype = x.dtype.element_ty
    outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = outputs < features
    k = tl.arange(0, BLOCK_K)
    # rows behind the end read the first row and store nothing
    own = weight + tl.where(inside, outputs, 0).to(tl.int64)[:, None] * width
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            # a row for each of the first threads
            rows = tile * OUTPUTS + tl.arange(0, LANES)
            fetched = (tl.arange(0, LANES) < OUTPUTS) & (rows < features)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
                "=r,l,r,r",
                [
                    (weight + rows.to(tl.int64) * width).to(tl.int64),
                    fetched.to(tl.int32),
                    tl.full((LANES,), PREFETCH, tl.int32),
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        gdc_wait()
    acc = tl.zeros((OUTPUTS, BLOCK_K), dtype=tl.float32)
    # triton loads ahead of what is no product of matrices only where the loop says how far
    for at in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        there = at + k < width
        weights = tl.load(own + (at + k)[None, :], mask=there[None, :], other=0.0).to(tl.float32)
        acc += weights * tl.load(x + at + k, mask=there, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(acc, axis=1)
    if ADDED:
        scale = tl.load(next_norm + outputs, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(out + outputs, mask=inside, other=0.0).to(tl.float32)
        after = (before + total.to(dtype).to(tl.float32)).to(dtype)
        tl.store(out + outputs, after, mask=inside)
        # what lies behind the end was made of the first row of the weight
        wide = tl.where(inside, after.to(tl.float32), 0.0)
        tl.store(next_weighed + outputs, (wide * scale).to(dtype), mask=inside)
        tl.store(next_squares + tile, tl.sum(wide * wide, axis=0) / features)
    else:
        tl.store(out + outputs, total, mask=inside)


def whole_rows(x: Tensor, weight: Tensor, tiling: WholeRows, *, pdl: bool = False) -> Tensor:
    """Return ``x @ weight.T`` as `row_linear.row_linear` does: one part, float32 ``[1, 1, features]``.

    Parameters
    ----------
    x
        ``[1, width]``, contiguous.
    weight
        ``[features, width]``, contiguous.
    tiling
        How it is read.
    pdl
        Whether neighbours in the stream may overlap.
    """
    out = torch.empty(1, 1, weight.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, weight, tiling, out, None, pdl)
    return out


def add_whole_rows(
    x: Tensor, weight: Tensor, tiling: WholeRows, residual: Tensor, norm: Tensor, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Add ``x @ weight.T`` to ``residual`` ``[1, features]``, and return what `row_linear.add_linear` returns."""
    weighed = torch.empty_like(residual)
    squares = torch.empty(tiling.tiles(residual.shape[1]), 1, dtype=torch.float32, device=x.device)
    _launch(x, weight, tiling, residual, (norm, weighed, squares), pdl)
    return weighed, squares


def _launch(
    x: Tensor, weight: Tensor, tiling: WholeRows, out: Tensor, added: tuple[Tensor, Tensor, Tensor] | None, pdl: bool
) -> None:
    features, width = weight.shape
    _whole_rows_kernel[(tiling.tiles(features),)](
        x,
        weight,
        out,
        *(added or (x, x, x)),
        features,
        width,
        ADDED=added is not None,
        OUTPUTS=_OUTPUTS,
        BLOCK_K=_BLOCK_K,
        STAGES=tiling.stages,
        # pieces of 16 bytes
        PREFETCH=0 if x.nbytes % 16 else min(_PREFETCH, x.nbytes),
        LANES=32 * _WARPS,
        PDL=pdl,
        num_warps=_WARPS,
        **launch_options(pdl),
    )
