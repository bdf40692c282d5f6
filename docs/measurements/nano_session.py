"""What all parts of nano_serving.py share: sizes, loaded models, results, a runtime that gives its memory back."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.models import resolve_model
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.nanovllm.cuda_runner import cuda_runner
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime

BLOCK = 16


@dataclass(frozen=True)
class Shapes:
    """What is measured, in the real size and in one for a dry run."""

    small: str = "dummy:Qwen3-0.6B"
    large: str = "dummy:Qwen3-8B"
    requests: int = 256
    shared: int = 64
    shortest: int = 100
    longest: int = 1024
    budget: int = 16384
    points: tuple[tuple[int, int], ...] = ((64, 3968), (128, 3968), (16, 3968), (64, 960), (1, 3968))
    prompts: tuple[tuple[int, int], ...] = ((1, 3968), (4, 3968), (16, 960))
    profiled: tuple[int, int] = (64, 3968)
    static: tuple[int, int] = (16, 3968)
    hosted: tuple[int, tuple[int, ...]] = (128, (512, 3968))
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    contexts: tuple[int, ...] = (1024, 4096, 512, 2048, 8192, 16384)
    steps: int = 40
    margin: int = 128


TINY = Shapes(
    small="dummy:tiny", large="dummy:tiny", requests=8, shared=4, shortest=5, longest=20, budget=128,
    points=((4, 60), (1, 60)), prompts=((1, 60), (2, 30)), profiled=(4, 60), static=(2, 20), batches=(1, 4), contexts=(64, 32),
    hosted=(4, (16, 60)), steps=4, margin=32,
)  # fmt: skip


class Session:
    """Options, models that were made, and where results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shapes = TINY if options.tiny else Shapes()
        self.device = torch.device(options.device)
        self.dtype = "float32" if options.device == "cpu" else "bfloat16"
        self._loaded: tuple[str, LoadedModel] | None = None
        self._bandwidth = 0.0

    def model(self, name: str) -> LoadedModel:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            release()
            self._loaded = (name, load_model(resolve_model(name), device=self.options.device, dtype=self.dtype))
        return self._loaded[1]

    @property
    def bandwidth(self) -> float:
        if not self._bandwidth:
            self._bandwidth = copy_bandwidth(self.device, size_bytes=1 << 24 if self.options.tiny else None)
            self.say("copy", tb_s=self._bandwidth / 1e12)
        return self._bandwidth

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def room(self) -> int:
        """Bytes for keys and values: what is free, less some for steps and graphs."""
        if self.device.type != "cuda":
            return 1 << 28
        release()
        return int(torch.cuda.mem_get_info(self.device)[0] - (12 << 30))

    def say(self, part: str, **found: Any) -> None:
        """Print a result, and append it to the file."""
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
        print(f"  {part}: " + ", ".join(f"{name} {value}" for name, value in rounded.items()), flush=True)
        if self.options.out:
            line = json.dumps({"part": part, "device": device_name(self.device)} | rounded)
            with (Path(self.options.out) / "nano_serving.jsonl").open("a") as file:
                file.write(line + "\n")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def release() -> None:
    # runners and wrappers hold cycles, and a pool is most of the memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def serving(
    session: Session, name: str, *, sizes: Any = None, warm_up: bool = False, **limits: Any
) -> Iterator[Runtime]:
    loaded = session.model(name)
    started = time.perf_counter()
    runtime = Runtime(
        loaded,
        Limits(block_size=BLOCK, **limits),
        runner=cuda_runner(build=True, sizes=sizes, warm_up=warm_up),
        overlap=True,
    )
    session.synchronize()
    facts = {key: value for key, value in runtime.runner.facts.items() if key != "products"}
    print(
        f"  runtime of {name} in {time.perf_counter() - started:.1f} s, pool {runtime.pool_bytes / 1e9:.1f} GB: {facts}",
        flush=True,
    )
    try:
        yield runtime
    finally:
        runtime.close()
        del runtime
        release()
