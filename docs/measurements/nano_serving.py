"""What does the nano runtime serve on a GPU, scheduler and sampling included? One script for one session.

    python docs/measurements/nano_serving.py all --out OUT            # everything, most important first, about 5 minutes
    python docs/measurements/nano_serving.py mixed batching           # some parts, in one process
    python docs/measurements/nano_serving.py all --device cpu --tiny  # the same code on small shapes

Parts (`all` runs them in several processes, so that none can spoil the next):

    (tests)   the GPU tests of tests/nanovllm, while the kernels of the products are compiled
    mixed     256 requests of 100 to 1024 tokens in and out: first round, warm, and what the options cost
    batching  64 of them here and by transformers' own continuous batching
    points    decode steps driven by the runtime: share of the floor, host time; prefill
    profile   the kernels of one decode step
    static    transformers' static cache with torch.compile at one of the points
    figure    tokens a second against batch and context, as JSON lines for nano_figure.py

Weights and prompts are random, and caches are filled with random keys where a prompt's computation is not what is measured.
The floor of a step: bytes of the weights that it reads (all but the embedding table) and of all live keys and values, over
the copy bandwidth measured in the same process. Results are printed as they come, and appended to OUT/nano_serving.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.models import resolve_model
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.nanovllm.cuda_runner import CudaRunner, cuda_runner
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

HERE = Path(__file__).resolve().parent
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
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    contexts: tuple[int, ...] = (1024, 4096, 512, 2048, 8192, 16384)
    steps: int = 40
    margin: int = 128


TINY = Shapes(
    small="dummy:tiny", large="dummy:tiny", requests=8, shared=4, shortest=5, longest=20, budget=128,
    points=((4, 60), (1, 60)), prompts=((1, 60), (2, 30)), profiled=(4, 60), static=(2, 20), batches=(1, 4), contexts=(64, 32),
    steps=4, margin=32,
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
    session: Session, name: str, *, sizes: Any = None, overlap: bool | None = True, **limits: Any
) -> Iterator[Runtime]:
    loaded = session.model(name)
    started = time.perf_counter()
    runtime = Runtime(loaded, Limits(block_size=BLOCK, **limits), runner=cuda_runner(sizes=sizes), overlap=overlap)
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


# ------------------------------------------------------------------------------------------------------------ mixed load


def workload(shapes: Shapes, vocabulary: int, seed: int, temperature: float = 0.0) -> list[Request]:
    """Lengths are the same for every seed."""
    lengths, content = random.Random(0), random.Random(seed)
    found = []
    for index in range(shapes.requests):
        prompt = [content.randrange(vocabulary) for _ in range(lengths.randint(shapes.shortest, shapes.longest))]
        chosen = SamplingParameters(
            max_new_tokens=lengths.randint(shapes.shortest, shapes.longest),
            temperature=temperature,
            seed=index,
            ignore_eos=True,
        )
        found.append(Request(prompt, chosen))
    return found


def serve(session: Session, runtime: Runtime, requests: list[Request], part: str, **about: Any) -> float:
    """Serve, report, and return output tokens a second."""
    before, waited = runtime.counters.to_dict(), runtime.waited_s
    session.synchronize()
    started = time.perf_counter()
    runtime.run(requests)
    session.synchronize()
    seconds = time.perf_counter() - started
    wrong = [request for request in requests if request.status is not Status.FINISHED]
    if wrong:
        raise RuntimeError(f"{len(wrong)} requests were not served, the first {wrong[0].status}: {wrong[0].reason}")
    done = {name: value - before[name] for name, value in runtime.counters.to_dict().items()}
    tokens = sum(request.output_length for request in requests)
    waited = runtime.waited_s - waited
    session.say(
        part, **about, output_tok_s=tokens / seconds, seconds=seconds, output_tokens=tokens, steps=done["steps"],
        decode_steps=done["decode_steps"], preemptions=done["preemptions"],
        host_ms_a_step=1e3 * (seconds - waited) / done["steps"], waited_s=waited,
        first_token_s=median(request.times[0] - started for request in requests),
    )  # fmt: skip
    return tokens / seconds


def mixed_limits(shapes: Shapes) -> dict[str, Any]:
    longest = 2 * shapes.longest
    return {
        "max_model_len": longest, "max_num_seqs": shapes.requests,
        "max_num_batched_tokens": max(shapes.budget, shapes.requests),
        "num_blocks": shapes.requests * -(-longest // BLOCK),
    }  # fmt: skip


def mixed(session: Session) -> None:
    shapes = session.shapes
    vocabulary = session.model(shapes.small).text_config.vocab_size
    with serving(session, shapes.small, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, workload(shapes, vocabulary, 1), "mixed", round="first")
        serve(session, runtime, workload(shapes, vocabulary, 2), "mixed", round="warm")
        serve(session, runtime, workload(shapes, vocabulary, 3), "mixed", round="warm again")
        runtime.overlap = False
        serve(session, runtime, workload(shapes, vocabulary, 4), "mixed", round="warm, no overlap")
        runtime.overlap = True
        serve(session, runtime, workload(shapes, vocabulary, 5, 0.6), "mixed", round="warm, temperature 0.6")
    # its pool goes before the next one comes
    del runtime
    release()
    with serving(session, shapes.small, prefill_first=True, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, workload(shapes, vocabulary, 6), "mixed", round="prefill first, warm")


def batching(session: Session) -> None:
    """The first requests of the mixed load with a quarter of their output, here and by transformers' manager."""
    shapes = session.shapes
    loaded = session.model(shapes.small)

    def requests(seed: int) -> list[Request]:
        return [
            Request(list(r.prompt), replace(r.sampling, max_new_tokens=-(-r.sampling.max_new_tokens // 4)))
            for r in workload(shapes, loaded.text_config.vocab_size, seed)[: shapes.shared]
        ]

    with serving(session, shapes.small, **mixed_limits(shapes)) as runtime:
        serve(session, runtime, requests(1), "batching", by="nano", round="first")
        ours = serve(session, runtime, requests(2), "batching", by="nano", round="warm")
    del runtime
    release()
    theirs = continuous_batching(session, loaded, [requests(3), requests(4)])
    session.say("batching", by="ratio", nano_over_transformers=ours / theirs)


def continuous_batching(session: Session, loaded: LoadedModel, rounds: list[list[Request]]) -> float:
    """Output tokens a second of transformers' own manager; of what it did within 30 s if a round takes longer."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = loaded.model
    attention = model.config._attn_implementation
    # flash attention would be fetched from the hub; what is in torch is there
    model.set_attn_implementation("paged|sdpa")
    most = max(request.sampling.max_new_tokens for request in rounds[0])
    # room for all requests at once, and no more: its attention works on the whole of it
    blocks = sum(-(-(r.prompt_length + r.sampling.max_new_tokens) // 256) for r in rounds[0]) + 16
    sizes = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=min(4096, 16 * session.shapes.longest))
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=most)
    speed = 0.0
    try:
        began = time.perf_counter()
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes, block=True, timeout=5
        ) as manager:
            for turn, requests in enumerate(rounds):
                session.synchronize()
                started = time.perf_counter()
                for r in requests:
                    manager.add_request(list(r.prompt), max_new_tokens=r.sampling.max_new_tokens, eos_token_id=-1)
                done: dict[str, Any] = {}
                while len(done) < len(requests) and manager.is_running() and time.perf_counter() - started < 30:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        done[result.request_id] = result
                seconds = time.perf_counter() - started
                failed = [str(result.error)[:200] for result in done.values() if result.error]
                tokens = sum(len(result.generated_tokens) for result in done.values())
                speed = tokens / seconds
                session.say(
                    "batching", by="transformers", round=("first", "warm")[turn], output_tok_s=speed, seconds=seconds,
                    output_tokens=tokens, finished=len(done), of=len(requests), failed=len(failed), error=failed[:1],
                    start_s=started - began, attention="paged|sdpa",
                )  # fmt: skip
                if len(done) < len(requests):
                    break
    finally:
        model.set_attn_implementation(attention)
        release()
    return speed


# ---------------------------------------------------------------------------------------------------------- decode steps


class Decoding:
    """A runtime in which every request decodes, over keys that were never computed: its prompts' steps are left out."""

    def __init__(self, session: Session, runtime: Runtime, batch: int, length: int) -> None:
        self.session, self.runtime, self.batch, self.length = session, runtime, batch, length
        run = runtime.runner.run
        logits = torch.zeros(batch, runtime.vocab_size, dtype=runtime.pools[0].keys.dtype, device=session.device)
        content = random.Random(length)
        prompt = [content.randrange(runtime.vocab_size) for _ in range(length)]
        for _ in range(batch):
            runtime.add(Request(prompt, SamplingParameters(max_new_tokens=session.shapes.margin, ignore_eos=True)))
        runtime.runner.run = lambda step: logits[: step.sample_rows.shape[0]]
        try:
            while any(request.pending > 1 for request in runtime.scheduler.running) or runtime.scheduler.waiting:
                runtime.step()
        finally:
            runtime.runner.run = run
        assert len(runtime.scheduler.running) == batch

    def time(self, steps: int) -> tuple[float, float]:
        """Seconds of a step, and of the host's part of it."""
        runtime, synchronize = self.runtime, self.session.synchronize
        runtime.step()
        synchronize()
        waited, started = runtime.waited_s, time.perf_counter()
        for _ in range(steps):
            runtime.step()
        host = time.perf_counter() - started - (runtime.waited_s - waited)
        # the last step's tokens are under way, as were those of the one before the first
        synchronize()
        return (time.perf_counter() - started) / steps, host / steps

    def floor_s(self) -> float:
        assert isinstance(self.runtime.runner, CudaRunner)
        decoder = self.runtime.runner.decoder
        weights = (
            self.session.model(self.session.shapes.large).weights_bytes if decoder is None else decoder.weight_bytes
        )
        pool = self.runtime.pools[0]
        live = sum(int(request.computed) for request in self.runtime.scheduler.running)
        return (weights + live * pool.block_bytes / pool.block_size) / self.session.bandwidth

    def end(self) -> None:
        for request in list(self.runtime.scheduler.running):
            self.runtime.cancel(request)
        while self.runtime.unfinished:
            self.runtime.step()
        self.runtime.step()


def scatter(runtime: Runtime) -> None:
    """Random keys, and free blocks in a random order: as after hours of service."""
    for pool in runtime.pools:
        for tensor in (pool.keys, pool.values):
            for layer in tensor:
                layer.normal_()
    for table in runtime.tables:
        blocks = list(table.pool._free)
        random.Random(0).shuffle(blocks)
        table.pool._free.clear()
        table.pool._free.update(dict.fromkeys(blocks))


def long_limits(session: Session, batches: Any, longest: int, most: int) -> dict[str, Any]:
    loaded = session.model(session.shapes.large)
    config = loaded.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * loaded.dtype.itemsize
    seqs = max(batches)
    return {
        "max_model_len": longest, "max_num_seqs": seqs, "max_num_batched_tokens": 1 << 20, "prefix_caching": False,
        "num_blocks": min(most, session.room() // (token_bytes * BLOCK)),
    }  # fmt: skip


def points(session: Session) -> None:
    shapes = session.shapes
    session.model(shapes.large)
    bandwidth = session.bandwidth
    sizes = sorted({batch for batch, _ in shapes.points})
    longest = max(length for _, length in shapes.points) + shapes.margin
    most = max(batch * (length + shapes.margin) for batch, length in shapes.points) // BLOCK + 2 * max(sizes)
    limits = long_limits(session, sizes, longest, most)
    with serving(session, shapes.large, sizes=sizes, **limits) as runtime:
        scatter(runtime)
        for batch, length in shapes.points:
            if batch * -(-(length + shapes.margin) // BLOCK) > runtime.num_blocks:
                session.say("points", batch=batch, context=length, skipped="the pool is too small")
                continue
            decoding = Decoding(session, runtime, batch, length)
            # of the shortest contexts that are timed
            floor = decoding.floor_s()
            for overlap in (True, False):
                runtime.overlap = overlap
                if not overlap:
                    runtime._settle()
                found = [decoding.time(shapes.steps // 2) for _ in range(2)]
                seconds, host = (min(pair[i] for pair in found) for i in range(2))
                session.say(
                    "points", batch=batch, context=length, overlap=overlap, step_ms=1e3 * seconds,
                    slowest_ms=1e3 * max(pair[0] for pair in found), floor_ms=1e3 * floor, share=floor / seconds,
                    host_ms=1e3 * host, tok_s=batch / seconds, copy_tb_s=bandwidth / 1e12,
                )  # fmt: skip
            runtime.overlap = True
            decoding.end()
        for batch, length in shapes.prompts:
            times = []
            for turn in range(4):
                content = random.Random(turn)
                requests = [
                    Request(
                        [content.randrange(runtime.vocab_size) for _ in range(length)],
                        SamplingParameters(max_new_tokens=1),
                    )
                    for _ in range(batch)
                ]
                for request in requests:
                    runtime.add(request)
                session.synchronize()
                started = time.perf_counter()
                runtime.run()
                session.synchronize()
                times.append(time.perf_counter() - started)
            seconds = median(times[1:])
            session.say("prefill", batch=batch, prompt=length, ms=1e3 * seconds, tok_s=batch * length / seconds)
        profile_of(session, runtime)


def profile_of(session: Session, runtime: Runtime) -> None:
    batch, length = session.shapes.profiled
    if batch * -(-(length + session.shapes.margin) // BLOCK) > runtime.num_blocks:
        return
    decoding = Decoding(session, runtime, batch, length)
    decoding.time(4)
    kinds = [
        torch.profiler.ProfilerActivity.CUDA if session.device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    ]
    steps = 4
    with torch.profiler.profile(activities=kinds) as profile:
        decoding.time(steps - 1)
    cuda = session.device.type == "cuda"

    def spent(row: Any) -> float:
        return float(row.self_device_time_total if cuda else row.self_cpu_time_total)

    rows = sorted(profile.key_averages(), key=lambda row: -spent(row))
    total = sum(spent(row) for row in rows)
    for row in rows[:14]:
        session.say(
            "profile", batch=batch, context=length, kernel=row.key[:80], ms_a_step=spent(row) / 1e3 / steps,
            share=spent(row) / max(total, 1e-9), calls_a_step=row.count / steps,
        )  # fmt: skip
    session.say("profile", batch=batch, context=length, kernel="all", ms_a_step=total / 1e3 / steps, share=1.0)
    decoding.end()


def profile(session: Session) -> None:
    shapes = session.shapes
    batch, length = shapes.profiled
    limits = long_limits(
        session, [batch], length + shapes.margin, batch * (length + shapes.margin) // BLOCK + 2 * batch
    )
    with serving(session, shapes.large, sizes=[batch], **limits) as runtime:
        scatter(runtime)
        profile_of(session, runtime)


def static(session: Session) -> None:
    """transformers' `generate` with a static cache, whose decode steps it compiles itself."""
    shapes = session.shapes
    loaded = session.model(shapes.large)
    batch, length = shapes.static
    ids = torch.randint(0, loaded.text_config.vocab_size, (batch, length), device=session.device)
    marks: list[float] = []

    def mark(tokens: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """A criterion that never stops: called behind every step."""
        session.synchronize()
        marks.append(time.perf_counter())
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

    for turn in ("first, compiles", "warm"):
        marks.clear()
        started = time.perf_counter()
        with torch.inference_mode():
            loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=shapes.steps, do_sample=False, eos_token_id=None,
                pad_token_id=0, cache_implementation="static", stopping_criteria=[mark],
            )  # fmt: skip
        step = median(later - earlier for earlier, later in pairwise(marks))
        session.say(
            "static", round=turn, batch=batch, context=length, step_ms=1e3 * step, tok_s=batch / step,
            first_token_s=marks[0] - started, seconds=marks[-1] - started,
        )  # fmt: skip


def figure(session: Session) -> None:
    shapes = session.shapes
    session.model(shapes.large)
    bandwidth = session.bandwidth
    longest = max(shapes.contexts) + shapes.margin
    most = max(shapes.batches) * longest // BLOCK
    limits = long_limits(session, shapes.batches, longest, most)
    with serving(session, shapes.large, sizes=shapes.batches, **limits) as runtime:
        scatter(runtime)
        for length in shapes.contexts:
            for batch in shapes.batches:
                if batch * -(-(length + shapes.margin) // BLOCK) > runtime.num_blocks:
                    continue
                decoding = Decoding(session, runtime, batch, length)
                floor = decoding.floor_s()
                seconds, host = min(decoding.time(shapes.steps // 4) for _ in range(2))
                session.say(
                    "figure", batch=batch, context=length, step_ms=1e3 * seconds, tok_s=batch / seconds, host_ms=1e3 * host,
                    floor_ms=1e3 * floor, copy_tb_s=bandwidth / 1e12, model=shapes.large,
                )  # fmt: skip
                decoding.end()


# --------------------------------------------------------------------------------------------------------------- session


def compile_products(session: Session) -> None:
    """Fill triton's cache on disk with the kernels that the runner tries."""
    from nano_decode import _warm_kernels

    from kvsuite.nanovllm.tiling_choice import CANDIDATES

    rows = (16, 32, 64, 128)
    _warm_kernels([(t, r, g) for t in CANDIDATES for r in rows for g in (False, True) if not g or t.splits == 1])


PARTS: dict[str, Callable[[Session], None]] = {
    "compile": compile_products, "mixed": mixed, "batching": batching, "points": points, "profile": profile, "static": static,
    "figure": figure,
}  # fmt: skip
#: seconds that a part may take in a process of several
LIMITS_S = {"compile": 60, "mixed": 90, "batching": 80, "points": 90, "profile": 40, "static": 90, "figure": 60}
#: processes of `all`, and the seconds that each may take
PROCESSES = (("mixed batching", 170), ("points figure static", 220))


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
