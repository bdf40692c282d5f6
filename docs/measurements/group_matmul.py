"""Products with packed weights on CUDA: are they right, and what do they reach of the copy bandwidth?

    python docs/measurements/group_matmul.py [device] [rounds] [formats whose tile sizes are tried, comma separated]

Correctness: dequantised tiles equal `dequantize_groups` bit for bit, products equal a float64 product with those weights.
Speed: every product runs over copies of the weight that together exceed the L2 cache, captured in one CUDA graph, so that
neither the cache nor the launch from Python shows. Bytes are the packed words and the scales; the share is of what a large
copy (read plus written) reaches in the same process. torch's dense product of the same shape and dtype is printed beside
it. The last table tries tile sizes: what `best_tile` should choose.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.quantization.bytes import weight_bytes
from kvsuite.quantization.formats import GROUP_FORMATS
from kvsuite.quantization.modules import PackedWeight
from kvsuite.quantization.triton_kernels import FEW_ROWS, Tile, dequantize, few_rows_product, group_matmul

# rows and columns of Llama-3-8B: query, key, gate, down, final layer
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
RAGGED = ((77, 130), (1, 40), (130, 1), (257, 4096 + 24))
COLD_BYTES = 512 * 2**20


def packed(name: str, rows: int, columns: int, device: torch.device) -> PackedWeight:
    spec = GROUP_FORMATS[name]
    weight = torch.randn(rows, columns, device=device, dtype=torch.float16) * 0.05
    return PackedWeight.pack(weight, spec, transposed=spec.transposed)


def check(name: str, rows: int, columns: int, device: torch.device) -> None:
    weight = packed(name, rows, columns, device)
    dense = weight.dense()
    assert torch.equal(dequantize(weight), dense), (name, rows, columns, "tiles")
    if rows > 40:
        assert torch.equal(dequantize(weight, 7, 40), dense[7:40]), (name, rows, columns, "part")
    bias = torch.randn(rows, device=device, dtype=dense.dtype)
    worst = 0.0
    for tokens in (1, 2, 8, 9, 16, 17, 33, 64, 65):
        x = torch.randn(tokens, columns, device=device, dtype=dense.dtype)
        exact = F.linear(x.double(), dense.double(), bias.double())
        size = exact.square().mean().sqrt().clamp_min(1e-3)
        error = float(((group_matmul(x, weight, bias).double() - exact).abs() / size).max())
        eps = torch.finfo(dense.dtype).eps
        # a rounding of outputs up to 8 deviations large
        assert error < max(8 * eps, 1e-4), (name, rows, columns, tokens, error)
        worst = max(worst, error)
    print(f"{name:8} {rows:6} x {columns:5}  largest error {worst:.1e} of the outputs' root mean square")


def seconds(calls: Sequence[Callable[[], Tensor]], rounds: int) -> float:
    """Median seconds of one call, all calls replayed from one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(rounds + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return median(samples[1:])


def copies(weight: PackedWeight) -> list[PackedWeight]:
    count = min(48, max(2, COLD_BYTES // weight_bytes(weight)))
    return [
        PackedWeight(
            weight.words.clone(), weight.scales.clone(),
            columns=weight.columns, spec=weight.spec, transposed=weight.transposed,
        )
        for _ in range(count)
    ]  # fmt: skip


def time_shape(name: str, rows: int, columns: int, device: torch.device, bandwidth: float, rounds: int) -> None:
    weights = copies(packed(name, rows, columns, device))
    size = weight_bytes(weights[0])
    dtype = weights[0].scales.dtype
    dense = [torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(max(2, len(weights) // 4))]
    line = f"{name:8} {rows:6} x {columns:5}"
    for tokens in (1, 4, 16, 32, 64, 2048):
        x = torch.randn(tokens, columns, device=device, dtype=dtype)
        ours = seconds([partial(group_matmul, x, weight, None) for weight in weights], rounds)
        plain = seconds([partial(F.linear, x, weight) for weight in dense], rounds)
        share = f" {size / ours / bandwidth:4.0%}" if tokens <= FEW_ROWS[x.element_size()] else ""
        line += f" | {tokens:4}: {ours * 1e6:8.1f} us{share}, torch {plain * 1e6:8.1f} us"
    print(line, flush=True)


def sweep(name: str, device: torch.device, bandwidth: float, rounds: int) -> None:
    for rows, columns in SHAPES[:3:2]:
        weights = copies(packed(name, rows, columns, device))
        size = weight_bytes(weights[0])
        for tokens in (1, 16, 64):
            x = torch.randn(tokens, columns, device=device, dtype=weights[0].scales.dtype)
            results = []
            for (tile_rows, warps), words, stages, programs in itertools.product(
                ((32, 2), (64, 2), (64, 4), (128, 8)), (16, 32, 64), (2, 3, 4), (2, 4)
            ):
                tile = Tile(tile_rows, words, warps, stages, programs)
                try:
                    calls = [partial(few_rows_product, x, weight, None, tile) for weight in weights]
                    results.append((seconds(calls, rounds), tile))
                except Exception as error:  # a tile that does not fit is an answer too
                    print(f"{name} {tokens} {tile}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            results.sort(key=lambda result: result[0])
            for taken, tile in results[:3]:
                share = size / taken / bandwidth
                print(f"{name:8} {rows:6} x {columns:5} {tokens:3} tokens {taken * 1e6:7.1f} us {share:4.0%} {tile}")
            sys.stdout.flush()


@torch.inference_mode()
def main(device: str = "cuda:0", rounds: str = "9", sweep_formats: str = "") -> None:
    target = torch.device(device)
    torch.cuda.set_device(target)
    torch.manual_seed(0)
    # sums in float32, so that the comparison product is not a shortcut
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    for name, (rows, columns) in itertools.product(GROUP_FORMATS, (*RAGGED, SHAPES[0])):
        check(name, rows, columns, target)
    bandwidth = copy_bandwidth(target)
    print(
        f"{torch.cuda.get_device_name(target)}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.2f} TB/s"
    )
    for name, (rows, columns) in itertools.product(("q4f16_1", "q4f16_0", "q3f16_1", "q4f32_1"), SHAPES):
        time_shape(name, rows, columns, target, bandwidth, int(rounds))
    for name in filter(None, sweep_formats.split(",")):
        sweep(name, target, bandwidth, int(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
