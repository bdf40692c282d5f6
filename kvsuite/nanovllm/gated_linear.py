"""The product of gate and up with its activation inside, for prompts. Importing this module needs triton.

The product of many rows is bound by arithmetic, and what follows it by memory: torch's product writes gates and the other
projection (195 MB a layer for 3,968 tokens of Qwen3-8B), which a kernel reads to write half as much. Here every program makes
tiles of the result one after another. Of a tile it multiplies the gate's columns and the other's as one operand, which
Hopper's copy engine fetches so, and writes ``silu(gate) * other`` alone.

No postponed annotations here: triton reads ``tl.constexpr`` from the signatures.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    TensorDescriptor,
)

# of a tile
_ROWS, _OUTPUTS, _INPUTS = 128, 128, 64
# tiles of rows that read a tile of the weight one after another, while the L2 cache has it
_GROUP = 16
_STAGES, _WARPS = 3, 8
# fewer are bound by reading the weight
_LEAST_ROWS = 512
# of the programs, at least, that have a tile in the mean of their turns: the last turn is as long as the others
_LEAST_SHARE = 0.9


def takes(weight: Tensor) -> bool:
    """Whether the kernel multiplies with a weight ``[2 * features, width]``."""
    features, width = weight.shape[0] // 2, weight.shape[1]
    # rows begin at multiples of 16 bytes
    return weight.dtype in (torch.bfloat16, torch.float16) and features % 8 == 0 and width % 8 == 0


def is_faster(rows: int, features: int, processors: int) -> bool:
    """Whether the kernel, of which each of ``processors`` SMs runs one program, takes less time than torch's product."""
    tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(features, _OUTPUTS)
    turns = triton.cdiv(tiles, processors)
    return rows >= _LEAST_ROWS and tiles >= _LEAST_SHARE * turns * processors


# a prompt's length must not cost a compilation
@triton.jit(do_not_specialize=["rows"])
def _gated_linear_kernel(
    x,
    weight,
    out,
    rows,
    features,
    width,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, ROWS)
    tiles_n = tl.cdiv(features, OUTPUTS)
    # one loop over the steps of all tiles: operands of the next tile are fetched while this one ends
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        size = min(tiles_m - first, GROUP)
        inside = tile % (GROUP * tiles_n)
        m = (first + inside % size) * ROWS
        n = inside // size * OUTPUTS
        sums = tl.zeros((ROWS, 2 * OUTPUTS), tl.float32)
        for k in tl.range(0, width, INPUTS, num_stages=STAGES):
            both = weight.load([0, n, k]).reshape(2 * OUTPUTS, INPUTS)
            sums = tl.dot(x.load([m, k]), both.T, sums)
        gate, other = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, OUTPUTS)), (0, 2, 1)))
        active = gate / (1.0 + tl.exp(-gate))
        out.store([m, n], (active * other).to(out.dtype))


def gated_linear(x: Tensor, weight: Tensor, processors: int) -> Tensor:
    """``silu(x @ gate.T) * (x @ other.T)`` ``[T, features]``, rounded once.

    Parameters
    ----------
    x
        ``[T, width]``, contiguous.
    weight
        ``[2 * features, width]``, contiguous, the gate's rows first; one that the kernel `takes`.
    processors
        SMs of the current stream.
    """
    (rows, width), features = x.shape, weight.shape[0] // 2
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(features, _OUTPUTS)
    _gated_linear_kernel[(min(processors, tiles),)](
        TensorDescriptor(x, [rows, width], [width, 1], [_ROWS, _INPUTS]),
        TensorDescriptor(weight, [2, features, width], [features * width, width, 1], [2, _OUTPUTS, _INPUTS]),
        TensorDescriptor(out, [rows, features], [features, 1], [_ROWS, _OUTPUTS]),
        rows,
        features,
        width,
        ROWS=_ROWS,
        OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
        GROUP=_GROUP,
        STAGES=_STAGES,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return out
