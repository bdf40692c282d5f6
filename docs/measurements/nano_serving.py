"""What does the nano runtime serve on a GPU, scheduler and sampling included? One script for one session.

    python docs/measurements/nano_serving.py all --out OUT            # everything, most important first, about 5 minutes
    python docs/measurements/nano_serving.py mixed batching           # some parts, in one process
    python docs/measurements/nano_serving.py all --device cpu --tiny  # the same code on small shapes

Parts (`all` runs them in several processes, so that none can spoil the next):

    (tests)   the GPU tests of tests/nanovllm, while the kernels of the products are compiled
    mixed     256 requests of 100 to 1024 tokens in and out: first round, warm, and what the options cost
    drawn     the same at temperature 0.6 from the first round on, with `cuda_runner(warm_up=True)`
    batching  64 of them here and by transformers' own continuous batching
    points    decode steps driven by the runtime: share of the floor, host time; prefill
    host      the host's time of a step by section
    profile   the kernels of one decode step
    static    transformers' static cache with torch.compile at one of the points
    figure    tokens a second against batch and context, as JSON lines for nano_figure.py

Weights and prompts are random, and caches are filled with random keys where a prompt's computation is not what is measured.
The floor of a step: bytes of the weights that it reads (all but the embedding table) and of all live keys and values, over
the copy bandwidth measured in the same process. Results are printed as they come, and appended to OUT/nano_serving.jsonl.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from nano_host import host
from nano_load import batching, mixed, mixed_drawn
from nano_points import figure, points, profile, static
from nano_session import Session, device_name, release

HERE = Path(__file__).resolve().parent


def compile_products(session: Session) -> None:
    """Fill triton's cache on disk with the kernels that the runner tries."""
    from nano_decode import _warm_kernels

    from kvsuite.nanovllm.tiling_choice import CANDIDATES

    rows = (16, 32, 64, 128)
    _warm_kernels([(t, r, g) for t in CANDIDATES for r in rows for g in (False, True) if not g or t.splits == 1])


PARTS: dict[str, Callable[[Session], None]] = {
    "compile": compile_products, "mixed": mixed, "drawn": mixed_drawn, "batching": batching, "host": host, "points": points,
    "profile": profile, "static": static, "figure": figure,
}  # fmt: skip
#: seconds that a part may take in a process of several
LIMITS_S = {
    "compile": 60, "mixed": 90, "drawn": 60, "batching": 80, "host": 60, "points": 90, "profile": 40, "static": 90,
    "figure": 60,
}  # fmt: skip
#: processes of `all`, and the seconds that each may take
PROCESSES = (("mixed batching", 170), ("drawn", 60), ("points host figure static", 260))


class OutOfTime(Exception):
    """A part took longer than it may."""


def run_parts(session: Session, names: list[str]) -> bool:
    def stop(*_: Any) -> None:
        raise OutOfTime

    fine = True
    signal.signal(signal.SIGALRM, stop)
    for name in names:
        started = time.perf_counter()
        print(f"{name} on {device_name(session.device)}", flush=True)
        signal.alarm(LIMITS_S[name])
        try:
            PARTS[name](session)
        except Exception:
            fine = False
            traceback.print_exc(limit=-8, file=sys.stdout)
        finally:
            signal.alarm(0)
        release()
        print(f"  [{name}: {time.perf_counter() - started:.0f} s]", flush=True)
    return fine


def run_all(options: argparse.Namespace) -> bool:
    began = time.perf_counter()
    common = [
        "--device",
        options.device,
        *(["--out", options.out] if options.out else []),
        *(["--tiny"] if options.tiny else []),
    ]
    script = [sys.executable, "-u", str(HERE / "nano_serving.py")]
    root = HERE.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    fine = True

    def call(command: list[str], limit: float) -> bool:
        try:
            return subprocess.run(command, cwd=root, env=environment, timeout=limit).returncode == 0
        except subprocess.TimeoutExpired:
            print(f"  stopped after {limit} s: {' '.join(command)}", flush=True)
            return False

    compiling = None
    if options.device != "cpu":
        compiling = subprocess.Popen([*script, "compile", *common], cwd=root, env=environment)
    print("tests", flush=True)
    extra = ["-n", "8"] if options.device != "cpu" else []
    if not any(point.value == "kvsuite.plugin" for point in entry_points(group="pytest11")):
        extra += ["-p", "kvsuite.plugin"]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "tests/nanovllm",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
    ]
    # without a GPU all of them are skipped or left out, and pytest says so by its status
    fine &= call([*pytest, *extra], 110) or options.device == "cpu"
    if compiling is not None:
        compiling.wait(60)
    print(f"[{time.perf_counter() - began:.0f} s]", flush=True)
    for names, limit in PROCESSES:
        fine &= call([*script, *names.split(), *common], limit)
        print(f"[{time.perf_counter() - began:.0f} s in all]", flush=True)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script itself")
    parser.add_argument("--out", help="folder for nano_serving.jsonl")
    options = parser.parse_args()
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        torch.set_num_threads(1)
    fine = run_all(options) if options.parts == ["all"] else run_parts(Session(options), options.parts)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
