"""Which tiling of a product is fastest, found by trying: it differs between shapes, row counts and devices.

Importing this module needs triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import torch
from triton.runtime.errors import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    OutOfResources,
)

from .compile_ahead import compiling_ahead
from .fused_layers import PRODUCTS, FusedDecoder, rows_bucket
from .row_linear import MOST_ROWS, Tiling, row_linear, seconds_per_product

# what read and activation of an ungated product take more, and reading partial sums: bytes a second from the L2 cache
_ACTIVATION_S = 2e-6
# what a step loses where a product is torch's: it neither begins before its predecessor ends nor lets its successor
_APART_S = 1.2e-6
_L2_BYTES_S = 4e12

# those that won a shape or a row count on an H200, among 21 that were tried
CANDIDATES = (
    Tiling(block_n=64, parts=1, block_k=64, splits=4, warps=4, stages=6),
    Tiling(block_n=64, parts=1, block_k=128, splits=1, warps=4, stages=4),
    Tiling(block_n=64, parts=1, block_k=128, splits=2, warps=4, stages=4),
    Tiling(block_n=64, parts=1, block_k=128, splits=4, warps=4, stages=4),
    Tiling(block_n=64, parts=2, block_k=64, splits=4, warps=4, stages=5),
    Tiling(block_n=64, parts=3, block_k=64, splits=1, warps=4, stages=5),
    Tiling(block_n=64, parts=3, block_k=64, splits=4, warps=4, stages=5),
    Tiling(block_n=128, parts=1, block_k=128, splits=1, warps=8, stages=3),
)


def choose_tilings(
    decoder: FusedDecoder, rows: Iterable[int], candidates: Collection[Tiling] = CANDIDATES
) -> dict[tuple[str, int], float]:
    """Set ``decoder.tilings`` for steps of ``rows`` rows; return the seconds of one product with the choice.

    Needs a CUDA device. Every product is timed over the weights of all layers, torch's own among the candidates.
    """
    found: dict[tuple[str, int], float] = {}
    buckets = sorted({rows_bucket(count) for count in rows if count <= MOST_ROWS})
    fitting = {product: _fitting(decoder, product, candidates) for product in PRODUCTS}
    with compiling_ahead() as compiles:
        for bucket, product in itertools.product(buckets if compiles else (), PRODUCTS):
            weight = decoder.weights(product)[0]
            x = torch.empty(bucket, weight.shape[1], dtype=weight.dtype, device=weight.device)
            for tiling in fitting[product]:
                row_linear(x, weight, tiling, gated=product == "gate_up", pdl=decoder.pdl)
    for bucket in buckets:
        for product in PRODUCTS:
            weights = decoder.weights(product)
            gated = product == "gate_up"
            times: dict[Tiling | None, float] = {None: seconds_per_product(weights, bucket, None)}
            times[None] += (_APART_S if decoder.pdl else 0.0) + (_ACTIVATION_S if gated else 0.0)
            features = weights[0].shape[0]
            for tiling in fitting[product]:
                read = 4 * bucket * features * tiling.splits / _L2_BYTES_S if tiling.splits > 1 else 0.0
                try:
                    times[tiling] = read + seconds_per_product(weights, bucket, tiling, gated=gated, pdl=decoder.pdl)
                except OutOfResources:
                    # its stages do not fit into this device's shared memory
                    continue
            best = min(times, key=lambda tiling: times[tiling])
            decoder.tilings[product, bucket] = best
            found[product, bucket] = times[best]
    return found


def _fitting(decoder: FusedDecoder, product: str, candidates: Iterable[Tiling]) -> list[Tiling]:
    features, width = decoder.weights(product)[0].shape
    gated = product == "gate_up"
    return [
        tiling
        for tiling in candidates
        if tiling.fits(features // 2 if gated else features, width, gated)
        # the final layer's sums have no kernel behind them that adds them
        and not (product == "final" and tiling.splits > 1)
        # the sums that a residual is added to are of one part
        and not (product in ("output", "down") and tiling.parts > 1)
    ]
