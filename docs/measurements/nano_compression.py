"""What does the compression stage cost? Device time of compressing one prompt, host time of a step with nothing to compress.

    python docs/measurements/nano_compression.py prompt host equal               # on a GPU, about a minute
    python docs/measurements/nano_compression.py host --device cpu               # the host's part needs no GPU
    python docs/measurements/nano_compression.py prompt host --device cpu --tiny # the same code on small shapes
    python docs/measurements/nano_compression.py launches --device cpu           # what is launched, which needs no GPU

Parts:

    prompt    a prompt of 3,968 tokens of dummy:Qwen3-8B, compressed by a factor of 5: device time from events around the
              stage's work alone, launched while the device was busy (median of some), the host's time for it, and the floor:
              bytes that have to be read and written (what stays, twice; all keys, where they are scored) over the copy
              bandwidth. The step's own time beside it: the sums of attention of h2o are computed with the prompt, and its
              products have a floor of their own
    host      64 sequences that decode under a policy: time of the books after a step, nothing to be done and every token
    launches  how often torch is asked to compute something, views left out: for a prompt of 3,968 tokens in 36 layers of
              Qwen3-8B's geometry, and after a decode step of 64 sequences under policies that act on every token. A copy to the
              device counts as none here
    kernels   where the device's time of one compressed prompt goes: its kernels by time, from torch's profiler
    equal     decode steps of 64 sequences whose prompts were compressed, and of 64 that are as long and were not, in turns

Weights and prompts are random.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nano_session import Session, release

from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy
from kvsuite.compression.prompt_view import PromptObservation
from kvsuite.nanovllm.block_table import tables_for
from kvsuite.nanovllm.decode_eviction import DecodeEviction
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "nanovllm"))

from launches import Launches

FACTOR = 5
POLICIES = ("streaming_llm", "knorm", "snapkv", "h2o")
REPEATS = 7
# some 30 ms
_WAITING_CYCLES = 60_000_000


def made(session: Session, model: str, policy: Policy | None, limits: Limits) -> Runtime:
    options: dict[str, Any] = {}
    if session.device.type == "cuda":
        from kvsuite.nanovllm.cuda_runner import cuda_runner

        options["runner"] = cuda_runner(graphs=False, tune=False)
    return Runtime(session.model(model), limits, policy=policy, overlap=False, eos_token_ids=(), **options)


def tokens(count: int, vocab: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def request(count: int, runtime: Runtime, seed: int, new: int) -> Request:
    sampling = SamplingParameters(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    return Request(tokens(count, runtime.vocab_size, seed), sampling)


def floor_bytes(runtime: Runtime, policy: str, length: int) -> int:
    """Keys and values that stay are read and written; keys of all tokens are read where they are scored."""
    stays = max(1, length // FACTOR)
    element = runtime.pools[0].keys.element_size()
    token = sum(group.token_bytes(element) for group in runtime.groups)
    return 2 * stays * token + (length * token // 2 if policy in ("knorm", "snapkv") else 0)


def products_floor_s(session: Session, runtime: Runtime, length: int) -> float:
    """Seconds of the products of queries and keys, below the diagonal, at the rate of a large product measured here."""
    size = 256 if session.options.tiny else 8192
    left, right = (torch.randn(size, size, device=session.device, dtype=runtime.pools[0].keys.dtype) for _ in range(2))
    times = []
    for _ in range(6):
        session.synchronize()
        started = time.perf_counter()
        left @ right
        session.synchronize()
        times.append(time.perf_counter() - started)
    config = session.model(session.shapes.large).text_config
    width = int(config.num_attention_heads) * runtime.pools[0].group.head_dim
    return length**2 * width * int(config.num_hidden_layers) / (2 * size**3 / min(times))


def prompt(session: Session) -> None:
    model, length = session.shapes.large, 60 if session.options.tiny else 3968
    steps: dict[str, float] = {}
    for name in ("", *POLICIES):
        policy = get_policy(name, factor=FACTOR) if name else None
        limits = Limits(
            max_model_len=length + 16, max_num_seqs=1, max_num_batched_tokens=length, prefix_caching=False,
            num_blocks=2 * (-(-length // 16) + 1),
        )  # fmt: skip
        runtime = made(session, model, policy, limits)
        device: list[float] = []
        host: list[float] = []
        after_step = runtime.compression.after_step

        def timed(
            *given: Any, after_step: Any = after_step, host: list[float] = host, device: list[float] = device
        ) -> None:
            session.synchronize()
            begin, end = marks(session)
            started = time.perf_counter()
            begin()
            after_step(*given)
            elapsed = end()
            host.append((time.perf_counter() if elapsed is None else elapsed[1]) - started)
            device.append(host[-1] if elapsed is None else elapsed[0])

        if policy is not None:
            runtime.compression.after_step = timed  # type: ignore[method-assign]
        walls = []
        for seed in range(2 * REPEATS):
            if seed == REPEATS:
                # the waiting of what was timed is none of a step's
                runtime.compression.after_step = after_step  # type: ignore[method-assign]
                walls = []
            one = runtime.add(request(length, runtime, seed, 1))
            started = time.perf_counter()
            runtime.step()
            session.synchronize()
            walls.append(time.perf_counter() - started)
            runtime.run()
            del one
        steps[name] = statistics.median(walls)
        facts = {"policy": name or "none", "length": length, "step_ms": 1e3 * steps[name]}
        if policy is not None:
            moved = floor_bytes(runtime, name, length)
            facts |= {
                "kept": policy.size_after(length), "device_ms": 1e3 * statistics.median(device),
                "host_ms": 1e3 * statistics.median(host), "floor_ms": 1e3 * moved / session.bandwidth,
                "prompt_more_ms": 1e3 * (steps[name] - steps[""]),
            }  # fmt: skip
        if name == "h2o":
            facts["products_floor_ms"] = 1e3 * products_floor_s(session, runtime, length)
        runtime.close()
        del runtime
        session.say("compress", **facts)


def kernels(session: Session) -> None:
    """Kernels of one compressed prompt by the device's time; on a CPU, operations by the host's."""
    from torch.profiler import ProfilerActivity, profile

    on_card = session.device.type == "cuda"
    length = 60 if session.options.tiny else 3968
    for name in POLICIES:
        limits = Limits(
            max_model_len=length + 16, max_num_seqs=1, max_num_batched_tokens=length, prefix_caching=False,
            num_blocks=2 * (-(-length // 16) + 1),
        )  # fmt: skip
        runtime = made(session, session.shapes.large, get_policy(name, factor=FACTOR), limits)
        after_step = runtime.compression.after_step
        profiles: list[Any] = []

        def profiled(*given: Any, after_step: Any = after_step, profiles: list[Any] = profiles) -> None:
            session.synchronize()
            with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as found:
                after_step(*given)
                session.synchronize()
            profiles.append(found)

        for seed in range(3):
            if seed == 2:
                runtime.compression.after_step = profiled  # type: ignore[method-assign]
            runtime.add(request(length, runtime, seed, 1))
            runtime.run()
        runtime.close()
        [found] = profiles
        rows = [
            (row.self_device_time_total if on_card else row.self_cpu_time_total, row.count, row.key)
            for row in found.key_averages()
        ]
        total = sum(time for time, _, _ in rows)
        session.say("kernels", policy=name, total_ms=total / 1e3, launches=sum(count for _, count, _ in rows))
        for time_us, count, key in sorted(rows, reverse=True)[:8]:
            print(f"    {time_us / 1e3:7.3f} ms {count:4d}x {key[:100]}", flush=True)
        del runtime


def marks(session: Session) -> tuple[Callable[[], None], Callable[[], tuple[float, float] | None]]:
    """Begin and end of a piece of device work: seconds between them on the device, and when the host had launched it."""
    if session.device.type != "cuda":
        return lambda: None, lambda: None
    event: Any = torch.cuda.Event
    first, last = event(enable_timing=True), event(enable_timing=True)

    def begin() -> None:
        # what is launched meanwhile waits, so that the device's time has no gaps in which the host launches
        torch.cuda._sleep(_WAITING_CYCLES)
        first.record()

    def end() -> tuple[float, float]:
        last.record()
        launched = time.perf_counter()
        last.synchronize()
        return first.elapsed_time(last) / 1e3, launched

    return begin, end


class Seen:
    """Queries of a prompt, as `kvsuite.nanovllm.prompt_observer.PromptObserver` would have caught them."""

    def __init__(self, policy: Policy, heads: int, length: int, width: int) -> None:
        self.layers = 36
        self._found = PromptObservation(policy.needs)
        keys = torch.zeros(heads // 4, length, width, dtype=torch.bfloat16)
        # sums of attention are computed with the prompt, not when it is compressed
        if policy.needs.attention_sums:
            self._found.sums = torch.rand(heads, length)
        else:
            self._found.add(torch.randn(heads, length, width, dtype=torch.bfloat16), lambda: keys, width**-0.5)

    def take(self, row: int, layers: Any) -> list[PromptObservation]:
        return [self._found] * len(layers)

    observations = take

    def turn(self, layer: int) -> None:
        return None

    def leave(self, row: int) -> None:
        return None


def launches(session: Session) -> None:
    """Launches of one prompt, and of a step of sequences that decode."""
    length, size, kv_heads, width, heads = (60 if session.options.tiny else 3968), 16, 8, 128, 32
    group = LayerGroup(tuple(range(36)), kv_heads, width, compressed=True)
    blocks = 2 * (-(-length // size) + 1)
    limits = Limits(max_model_len=length + 16, max_num_seqs=1, max_num_batched_tokens=length, num_blocks=blocks)
    for name in POLICIES:
        policy = get_policy(name, factor=FACTOR)
        pool = KVPool(group, num_blocks=blocks, block_size=size, device=torch.device("cpu"), dtype=torch.bfloat16)
        tables = tables_for(group, limits, blocks)
        seen: Any = Seen(policy, heads, length, width) if policy.needs.prompt else None
        eviction = DecodeEviction(policy, group, tables, pool, seen)
        tables.reserve(0, length)
        tables.commit(0, length)
        counting = Launches()
        with counting:
            work = eviction.prompt.complete(0)
            assert work is not None
            work()
        session.say("prompt", policy=name, length=length, layers=36, launches=counting.count)
        del pool, eviction
    host(session, counted=True)


def host(session: Session, counted: bool = False) -> None:
    """Time of the books after a decode step of 64 sequences, medians of steps; or what it launches."""
    sequences, length, steps = 64, 96, 24
    for name, parameters in (
        ("streaming_llm", {"factor": FACTOR}),
        ("snapkv", {"factor": FACTOR}),
        ("l2_compress", {"keep_ratio": 0.5, "prune_after": 48}),
        ("streaming_llm", {"recent_size": 32}),
        ("l2_compress", {"keep_ratio": 0.5, "prune_after": 48, "mode": "every_token"}),
        ("fix_size_l2", {"size": 48}),
    ):
        policy = get_policy(name, **parameters)
        limits = Limits(
            max_model_len=length + steps + 8, max_num_seqs=sequences, max_num_batched_tokens=sequences * length,
            prefix_caching=False, num_blocks=sequences * 9,
        )  # fmt: skip
        runtime = made(session, "dummy:tiny", policy, limits)
        stage = runtime.compression
        after_step = stage.after_step
        spent = [0.0]

        counting = Launches()

        def timed(*given: Any, after_step: Any = after_step, spent: list[float] = spent) -> None:
            started = time.perf_counter()
            after_step(*given)
            spent[-1] += time.perf_counter() - started

        def counting_after_step(
            *given: Any, after_step: Any = after_step, spent: list[float] = spent, counting: Launches = counting
        ) -> None:
            before = counting.count
            with counting:
                after_step(*given)
            spent[-1] += counting.count - before

        if counted:
            stage.after_step = counting_after_step  # type: ignore[method-assign]
        else:
            stage.after_step = timed  # type: ignore[method-assign]
        for seed in range(sequences):
            runtime.add(request(length, runtime, seed, steps))
        while runtime.unfinished:
            runtime.step()
            spent.append(0.0)
        runtime.close()
        # the first step computes all prompts
        found = statistics.median(spent[2:-2])
        facts = {"launches": found} if counted else {"ms": 1e3 * found}
        session.say("books", policy=name, parameters=parameters, sequences=sequences, **facts)


def equal(session: Session) -> None:
    """Median gaps between tokens, of rounds that take turns so that both see the same clock of the device."""
    sequences, length, steps = (3, 60, 16) if session.options.tiny else (64, 3968, 120)
    stays = max(1, length // FACTOR)
    found: dict[str, list[float]] = {}
    for name in ("", "streaming_llm", "snapkv") * 2:
        policy = get_policy(name, factor=FACTOR) if name else None
        own = length if name else stays
        limits = Limits(
            max_model_len=own + steps + 8, max_num_seqs=sequences, max_num_batched_tokens=max(8192, sequences),
            prefix_caching=False, prefill_first=True, num_blocks=sequences * (-(-(stays + steps + 8) // 16)) + 2 * 8192 // 16,
        )  # fmt: skip
        options: dict[str, Any] = {"stage": "async"} if name else {}
        if session.device.type == "cuda":
            from kvsuite.nanovllm.cuda_runner import cuda_runner

            options["runner"] = cuda_runner(build=True, sizes=[sequences])
        runtime = Runtime(session.model(session.shapes.large), limits, policy=policy, eos_token_ids=(), **options)
        requests = runtime.run([request(own, runtime, seed, steps) for seed in range(sequences)])
        # the last to begin: everybody decodes from its first token on
        late = max(requests, key=lambda one: one.times[0])
        earliest = min(one.times[-1] for one in requests)
        times = [at for at in late.times[2:] if at <= earliest]
        found.setdefault(name, []).append(statistics.median(b - a for a, b in itertools.pairwise(times)))
        runtime.close()
        del runtime
        release()
    for name, medians in found.items():
        session.say(
            "equal", policy=name or "none", sequences=sequences, stored=stays, step_ms=1e3 * statistics.mean(medians),
            rounds_ms=[round(1e3 * one, 3) for one in medians],
            of_dense=statistics.mean(medians) / statistics.mean(found[""]),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["prompt", "host", "launches", "kernels", "equal"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out")
    session = Session(parser.parse_args())
    for part in session.options.parts:
        {"prompt": prompt, "host": host, "launches": launches, "kernels": kernels, "equal": equal}[part](session)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
