"""What do the products of prompts take that have something inside, next to torch's with a kernel behind? On an H200.

    python docs/measurements/nano_prompts.py gated            # gate and up with their activation, about 20 s
    python docs/measurements/nano_prompts.py added            # output and down with the residual, about 10 s
    python docs/measurements/nano_prompts.py gated --rows 640 768 896

Shapes are those of Qwen3-8B, numbers are random. Arms take turns; each is launched for so long (`--seconds`) that the card is
at its power limit, and timed over the last 60 % of it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kvsuite.nanovllm.fused_kernels import add_norm, silu_mul
from kvsuite.nanovllm.gated_linear import gated_linear, is_faster
from kvsuite.nanovllm.side_streams import processors

WIDTH, FEATURES = 4096, 12288
DEVICE = torch.device("cuda:0")
Arms = Mapping[str, Callable[[], object]]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def milliseconds(launch: Callable[[], object], seconds: float) -> float:
    """Of one launch when the card is warm."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launch()
    begin.record()
    for _ in range(3):
        launch()
    end.record()
    end.synchronize()
    times = max(10, int(3e3 * seconds / begin.elapsed_time(end)))
    lead = 4 * times // 10
    for _ in range(lead):
        launch()
    begin.record()
    for _ in range(times - lead):
        launch()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) / (times - lead))


def in_turns(what: str, rows: int, arms: Arms, seconds: float) -> None:
    found: dict[str, list[float]] = {name: [] for name in arms}
    for names in (list(arms), list(arms)[::-1]):
        for name in names:
            found[name].append(milliseconds(arms[name], seconds))
    words = ", ".join(f"{name} {1e3 * statistics.mean(times):.1f}" for name, times in found.items())
    print(f"{what}, {rows} rows, us: {words}", flush=True)


def gated(rows: int, seconds: float) -> None:
    weight, x, own = random(2 * FEATURES, WIDTH) * 0.02, random(rows, WIDTH), processors(DEVICE)
    gate, other = (x[:256].float() @ weight.float().T).chunk(2, dim=-1)
    expected = functional.silu(gate) * other
    arms = {
        "torch": lambda: functional.linear(x, weight),
        "torch and silu": lambda: silu_mul(functional.linear(x, weight)[None], x.dtype)[:256],
        "inside": lambda: gated_linear(x, weight, own)[:256],
    }
    errors = [
        float((arms[name]().float() - expected).norm() / expected.norm()) for name in ("torch and silu", "inside")
    ]
    print(f"error against float32 {errors[0]:.2e}, inside {errors[1]:.2e}; taken: {is_faster(rows, FEATURES, own)}")
    in_turns("gate and up", rows, arms, seconds)


def added(rows: int, seconds: float) -> None:
    residual, norm = random(rows, WIDTH), random(WIDTH)
    for name, width in (("output", WIDTH), ("down", FEATURES)):
        # small enough that a sum of thousands of them is finite
        weight, x = random(WIDTH, width) * 0.01, random(rows, width)

        def apart(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return add_norm(functional.linear(x, weight)[None], residual, norm, 1e-6)

        def inside(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return add_norm(None, residual.addmm_(x, weight.t()), norm, 1e-6)

        arms = {
            "product": lambda x=x, w=weight: functional.linear(x, w),
            "and add, norm": apart,
            "inside, and norm": inside,
        }
        in_turns(name, rows, arms, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["gated", "added"])
    parser.add_argument("--rows", type=int, nargs="+", default=[3968, 15872, 2048, 1024, 512])
    parser.add_argument("--seconds", type=float, default=0.5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for part in options.parts:
            for rows in options.rows:
                {"gated": gated, "added": added}[part](rows, options.seconds)


if __name__ == "__main__":
    main()
