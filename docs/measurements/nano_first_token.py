"""What does the first user of nano on a GPU wait for, from the start of a process to the first token of a prompt?

    python docs/measurements/nano_first_token.py --empty                 # kernel caches in new, empty folders
    python docs/measurements/nano_first_token.py --caches /tmp/kernels   # in these folders, whatever they hold
    python docs/measurements/nano_first_token.py --empty --steps 1x3968,64x960   # and how long decode steps take then

Weights are random. Phases follow each other; the time in which anything was built is taken out of the phase in which it
happened. Builds are listed by kind, each with its own seconds, whose sum is more than what was waited for where they ran side
by side: Triton's compilations as its own listener times them, libraries of FlashInfer as its build takes. A library that came
with FlashInfer counts as built.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import tempfile  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402


def main() -> None:
    options = _options()
    _caches(options)
    phases = Phases()
    with phases.of("import"):
        import torch

        from kvsuite.models import resolve_model
        from kvsuite.models.load import load_model
        from kvsuite.nanovllm.cuda_runner import CudaRunner, cuda_runner
        from kvsuite.nanovllm.limits import Limits
        from kvsuite.nanovllm.request import Request
        from kvsuite.nanovllm.runtime import Runtime
        from kvsuite.nanovllm.sampling import SamplingParameters
    interpreter = phases.begin - STARTED
    with phases.of("device"):
        torch.zeros(1, device="cuda").item()
    watch(phases)
    with phases.of("weights"):
        loaded = load_model(resolve_model(options.model), device="cuda", dtype="bfloat16")
        torch.cuda.synchronize()
    longest = options.prompt + 128
    limits = Limits(
        max_model_len=longest,
        max_num_seqs=options.sequences,
        num_blocks=options.sequences * -(-longest // 16),
        prefix_caching=False,
    )
    capture = CudaRunner._capture

    def timed_capture(self: Any, *given: Any) -> Any:
        with phases.of("capture", within="start"):
            found = capture(self, *given)
            torch.cuda.synchronize()
        return found

    CudaRunner._capture = timed_capture  # type: ignore[method-assign]
    with phases.of("start"):
        runtime = Runtime(loaded, limits, runner=cuda_runner(**json.loads(options.runner)))
        torch.cuda.synchronize()
    content = random.Random(0)
    for name in ("first prompt", "second prompt"):
        ids = [content.randrange(runtime.vocab_size) for _ in range(options.prompt)]
        request = Request(ids, SamplingParameters(max_new_tokens=1, ignore_eos=True))
        with phases.of(name):
            runtime.add(request)
            while runtime.unfinished:
                runtime.step()
            torch.cuda.synchronize()
        if name == "first prompt":
            phases.say(interpreter)
    print(f"  second prompt {phases.seconds['second prompt']:.3f} s, builds in it {phases.built('second prompt')}")
    print("  " + json.dumps(dict(runtime.runner.facts))[:4000])
    if options.steps:
        times(runtime, options)
    runtime.close()


class Phases:
    """Seconds of each phase without the time in which something was built, and the builds."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.builds: list[tuple[str, str, str, float, float]] = []
        self._now: list[str] = []

    @contextmanager
    def of(self, name: str, within: str | None = None) -> Iterator[None]:
        began = time.perf_counter()
        self._now.append(name)
        try:
            yield
        finally:
            self._now.pop()
            took = time.perf_counter() - began - self.waited(began)
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            if within is not None:
                self.seconds[within] = self.seconds.get(within, 0.0) - took

    def build(self, kind: str, name: str, seconds: float) -> None:
        now = time.perf_counter()
        self.builds.append((kind, self._now[-1] if self._now else "?", name, now - seconds, now))

    def waited(self, since: float = 0.0) -> float:
        """Seconds since a time in which at least one thing was being built."""
        found, reached = 0.0, since
        for *_, begin, end in sorted(self.builds, key=lambda build: build[3]):
            found += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return found

    def built(self, phase: str) -> int:
        return sum(1 for _, where, *_ in self.builds if where == phase)

    def say(self, interpreter: float) -> None:
        whole = time.perf_counter() - STARTED
        print(f"from start of the process to the first token: {whole:.1f} s", flush=True)
        print(f"  builds {self.waited():.1f} s, interpreter {interpreter:.1f} s, " + ", ".join(
            f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items()
        ), flush=True)  # fmt: skip
        kinds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for kind, phase, name, begin, end in self.builds:
            kinds[kind, phase, name].append(end - begin)
        for (kind, phase, name), each in sorted(kinds.items(), key=lambda item: -sum(item[1])):
            print(f"    {kind:<10} {phase:<12} {name:<28} {len(each):3d} in {sum(each):5.1f} s", flush=True)


def watch(phases: Phases) -> None:
    """Note every kernel that Triton compiles and every library that FlashInfer builds."""
    import triton

    def compiled(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if not cache_hit:
            phases.build("triton", str(getattr(src, "name", "?")), times.total / 1e6)

    triton.knobs.compilation.listener = compiled
    try:
        from flashinfer.jit import core
    except ImportError:
        return
    build = core.JitSpec.build

    def timed(self: Any, *given: Any, **named: Any) -> None:
        began = time.perf_counter()
        build(self, *given, **named)
        took = time.perf_counter() - began
        # ninja that finds everything built is none
        if took > 1:
            phases.build("flashinfer", "fa3" if self.name.endswith("_sm90") else "fa2", took)

    core.JitSpec.build = timed


def times(runtime: Any, options: argparse.Namespace) -> None:
    """Milliseconds of decode steps over keys that are there already."""
    import torch
    from nano_session import Session
    from nano_steps import Decoding

    session = Session(argparse.Namespace(tiny=False, device="cuda", out=None))
    for batch, length in (tuple(map(int, point.split("x"))) for point in options.steps.split(",")):
        with torch.inference_mode():
            found = Decoding(session, runtime, batch, length)
            steps = sorted(found.time(20)[0] for _ in range(2))
            found.end()
        print(f"  step {batch} x {length}: {1e3 * steps[0]:.2f} ms", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dummy:Qwen3-8B")
    parser.add_argument("--prompt", type=int, default=3968)
    parser.add_argument(
        "--sequences", type=int, default=64, help="that decode at a time: decode steps are captured for them"
    )
    parser.add_argument("--runner", default="{}", help="options of cuda_runner, JSON")
    parser.add_argument("--steps", default="", help="batch x context, separated by commas")
    parser.add_argument("--empty", action="store_true")
    parser.add_argument("--caches", type=Path, help="folder of the kernel caches; without it those of this user")
    return parser.parse_args()


def _caches(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp()) if options.empty else options.caches
    if folder is not None:
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(folder)
        os.environ["CUDA_CACHE_PATH"] = str(folder / "cuda")
        os.environ["KVSUITE_CACHE"] = str(folder / "kvsuite")


if __name__ == "__main__":
    main()
