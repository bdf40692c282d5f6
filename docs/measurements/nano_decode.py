"""How close to its floor is a decode step of the nano runtime on a GPU? Device side: no scheduler, no sampling but argmax.

    python docs/measurements/nano_decode.py check                      # fused against unfused, captured against eager
    python docs/measurements/nano_decode.py products --rows 1,16,64    # every tiling of every product against torch's
    python docs/measurements/nano_decode.py attention                  # the split kernel, cut in several ways
    python docs/measurements/nano_decode.py ragged                     # sequences of unequal length, the longest first or not
    python docs/measurements/nano_decode.py steps --cases 1x3968,64x960
    python docs/measurements/nano_decode.py prefill
    python docs/measurements/nano_decode.py profile --cases 16x3968

Weights and prompts are random. The floor of a step: bytes of the weights that it reads (all but the embedding table) and of
all keys and values, over the copy bandwidth measured in the same process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kvsuite.meters.bandwidth import copy_bandwidth
from kvsuite.models import resolve_model
from kvsuite.models.load import load_model
from kvsuite.nanovllm import fused_layers
from kvsuite.nanovllm.batch import BatchBuilder, GroupInputs, StepBatch
from kvsuite.nanovllm.decode_graphs import DecodeGraphs
from kvsuite.nanovllm.flashinfer_libraries import FA2, FA3, Libraries, libraries_for
from kvsuite.nanovllm.fused_layers import PRODUCTS, FusedDecoder, not_fusable, rows_bucket
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kernel_attention import KernelAttention
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.row_linear import MOST_ROWS
from kvsuite.nanovllm.runner import ModelRunner
from kvsuite.nanovllm.tiling_choice import CANDIDATES, choose_tilings

BLOCK = 16
MARGIN = 64


class Bench:
    """A model, a pool for the largest case, and sequences whose blocks are scattered over it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.loaded = load_model(resolve_model(options.model), device=options.device, dtype=options.dtype)
        self.config = self.loaded.text_config
        self.cases = [tuple(int(n) for n in case.split("x")) for case in options.cases.split(",")]
        self.rng = np.random.default_rng(0)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        self.group = LayerGroup(tuple(range(self.config.num_hidden_layers)), kv_heads, head_dim)
        self.heads = heads
        reason = not_fusable(self.loaded.model, self.config)
        assert reason is None, reason

    def pool(self, tokens: int) -> KVPool:
        pool = KVPool(
            self.group, num_blocks=tokens // BLOCK + 1, block_size=BLOCK, device=self.device, dtype=self.loaded.dtype
        )
        for tensor in (pool.keys, pool.values):
            for layer in tensor:
                layer.normal_()
        return pool

    def tables(self, batch: int, length: int, pool: KVPool) -> Any:
        need = -(-length // BLOCK)
        return (1 + self.rng.permutation(pool.num_blocks)[: batch * need]).reshape(batch, need).astype(np.int32)

    def batch(self, builder: BatchBuilder, tables: Any, lengths: Any, counts: Any) -> StepBatch:
        """The last ``counts`` tokens of sequences of ``lengths`` tokens."""
        places = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
        row = np.repeat(np.arange(len(lengths)), counts)
        return builder.build(
            ids=self.rng.integers(0, self.config.vocab_size, len(places)),
            positions=places.astype(np.int64),
            counts=np.asarray(counts, dtype=np.int64),
            sample_rows=np.cumsum(counts) - 1,
            groups=[
                GroupInputs(
                    slots=tables[row, places // BLOCK].astype(np.int64) * BLOCK + places % BLOCK,
                    kv_lengths=np.asarray(lengths, dtype=np.int64),
                    block_tables=tables,
                    dropped=np.zeros(len(lengths), dtype=np.int64),
                )
            ],
        )


def error(found: torch.Tensor, expected: torch.Tensor) -> str:
    found, expected = found.double(), expected.double()
    relative = ((found - expected).norm() / expected.norm()).item()
    same = (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
    return f"relative {relative:.2e}, largest {(found - expected).abs().max().item():.3e}, same argmax {same:.3f}"


def check(bench: Bench) -> None:
    """Fused and captured steps against transformers' own forward pass over the whole sequence."""
    from kvsuite.nanovllm.reference_attention import ReferenceAttention

    lengths = np.array([300, 17, 129, 513])
    exact = bench.loaded.dtype == torch.float32
    pool = bench.pool(4 * 1024)
    tables = bench.tables(4, 576, pool)
    builder = BatchBuilder(bench.device)
    prompt = bench.batch(builder, tables, lengths, lengths)
    ids = [part.clone() for part in prompt.ids.split(lengths.tolist())]
    with torch.inference_mode():
        whole = [bench.loaded.model(part[None], use_cache=False).logits[0].float() for part in ids]
    attention: Any
    attention = (
        ReferenceAttention([pool])
        if exact
        else KernelAttention([pool], query_heads=bench.heads, libraries=libraries_for([pool], build=True))
    )
    last = torch.stack([rows[-1] for rows in whole])
    if not exact:
        import copy

        # the same weights computed in float32: what every bfloat16 result is an approximation of
        model = copy.deepcopy(bench.loaded.model).float()
        with torch.inference_mode():
            truth = torch.stack([model(part[None], use_cache=False).logits[0, -1] for part in ids])
        del model
        torch.cuda.empty_cache()
        print("  transformers in bfloat16 against float32:", error(last, truth))
        last = truth
    runner = ModelRunner(bench.loaded, attention)
    print("  unfused paged prefill:", error(runner.run(prompt), last))
    runner.close()
    decoder = FusedDecoder(bench.loaded.model, bench.config, 1024)
    with torch.inference_mode():
        again = [bench.loaded.model(part[None], use_cache=False).logits[0, -1].float() for part in ids]
    before = torch.stack([rows[-1] for rows in whole])
    print("  transformers on merged weights, largest difference:", (torch.stack(again) - before).abs().max().item())
    attention.begin(prompt)
    print("  fused prefill:", error(decoder.logits(prompt, attention), last))
    # the last token once more, as a decode step
    step = bench.batch(builder, tables, lengths, np.ones(4, dtype=np.int64))
    step.ids.copy_(torch.stack([part[-1] for part in ids]))
    attention.begin(step)
    print("  fused decode:", error(decoder.logits(step, attention), last))
    if exact:
        return
    graphs = DecodeGraphs(decoder.logits, attention, [6], tables.shape[1])
    found = graphs.run(step)
    assert found is not None
    print(f"  captured decode, {graphs.step(6).attention.kinds}:", error(found, last))
    for tiling in CANDIDATES:
        decoder.tilings = {}
        for product, weight in ((name, decoder.weights(name)[0]) for name in PRODUCTS):
            gated = product == "gate_up"
            if tiling.fits(weight.shape[0] // (2 if gated else 1), weight.shape[1], gated):
                decoder.tilings[product, 16] = tiling
        attention.begin(step)
        print(f"  {tiling}:", error(decoder.logits(step, attention), last), flush=True)


def _tilings() -> list[Any]:
    from kvsuite.nanovllm.row_linear import Tiling

    shapes = [
        # block_n, parts, block_k, warps, stages
        (64, 1, 64, 4, 6), (64, 1, 128, 4, 4), (64, 2, 64, 4, 5), (64, 3, 64, 4, 5), (64, 3, 64, 8, 4), (128, 1, 64, 8, 5),
        (128, 1, 128, 8, 3),
    ]  # fmt: skip
    return [Tiling(n, p, k, splits, w, s) for (n, p, k, w, s), splits in itertools.product(shapes, (1, 2, 4))]


def _warm_kernels(jobs: list[tuple[Any, ...]]) -> None:
    """Compile in other processes; the cache on disk is shared."""
    import multiprocessing

    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(_compile, jobs, chunksize=1)
    print(f"  compiled {len(jobs)} kernels in {time.perf_counter() - started:.0f} s", flush=True)


def _compile(job: tuple[Any, ...]) -> None:
    from kvsuite.nanovllm.row_linear import row_linear

    tiling, rows, gated = job
    width = 64 * 4 * 12
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(1024, width, dtype=torch.bfloat16, device="cuda")
    try:
        row_linear(x, weight, tiling, gated=gated, pdl=True)
    except Exception as failure:
        print("  not usable:", tiling, rows, gated, str(failure).splitlines()[:1])


def products(bench: Bench) -> None:
    """Microseconds of every product by tiling, and the best; the floor is its weight over the copy bandwidth."""
    from kvsuite.nanovllm.row_linear import seconds_per_product

    bandwidth = copy_bandwidth(bench.device)
    decoder = FusedDecoder(bench.loaded.model, bench.config, 8192)
    buckets = [rows_bucket(int(n)) for n in bench.options.rows.split(",")]
    tilings = _tilings()
    _warm_kernels([(t, r, g) for t in tilings for r in buckets for g in (False, True) if t.splits < (2 if g else 3)])
    report: dict[str, Any] = {}
    for product, rows in itertools.product(PRODUCTS, buckets):
        weights = decoder.weights(product)
        features, width = weights[0].shape
        gated = product == "gate_up"
        floor = weights[0].nbytes / bandwidth
        times: dict[str, float] = {"torch": seconds_per_product(weights, rows, None)}
        for tiling in tilings:
            if not tiling.fits(features // (2 if gated else 1), width, gated):
                continue
            if product == "final" and tiling.splits > 1:
                continue
            try:
                times[str(tiling)] = seconds_per_product(weights, rows, tiling, gated=gated)
            except Exception as failure:
                times[str(tiling)] = float("inf")
                print("  failed:", product, rows, tiling, str(failure).splitlines()[:1])
        report[f"{product} {rows}"] = {name: 1e6 * s for name, s in times.items()} | {"floor": 1e6 * floor}
        order = sorted(times, key=lambda name: times[name])
        torchs = f"torch {1e6 * times['torch']:.1f} ({floor / times['torch']:.0%})"
        print(f"  {product} rows {rows} floor {1e6 * floor:.1f} us: {torchs}")
        for name in order[:3]:
            print(f"     {1e6 * times[name]:.1f} ({floor / times[name]:.0%}) {name}", flush=True)
    _save(bench, "products", report)


def _save(bench: Bench, name: str, value: Any) -> None:
    if bench.options.out:
        (Path(bench.options.out) / f"{name}.json").write_text(json.dumps(value, indent=1))


def attention(bench: Bench) -> None:
    """One layer's decode attention in a graph over all layers, keys cut in several ways."""
    from kvsuite.nanovllm.split_attention import split_attention

    pool = bench.pool(max(b * (n + MARGIN) for b, n in bench.cases))
    builder = BatchBuilder(bench.device)
    scale = bench.group.head_dim**-0.5
    for size, length in bench.cases:
        tables = bench.tables(size, length, pool)
        batch = bench.batch(builder, tables, np.full(size, length), np.ones(size, dtype=np.int64))
        query = torch.randn(size, bench.heads, bench.group.head_dim, dtype=bench.loaded.dtype, device=bench.device)
        nbytes = size * length * bench.group.token_bytes(2) / len(bench.group.layers)
        arms: dict[str, Any] = {}
        most = 64 if size == 1 else max(1, 1024 // (size * bench.group.kv_heads))
        for splits, tokens, warps, stages in itertools.product(
            (1, 2, 4, 8, 16, 32, 64), (32, 64, 128), (2, 4), (2, 3, 4)
        ):
            if splits > most or splits < most // 4 or (tokens == 128 and stages == 4) or (tokens == 32 and stages == 2):
                continue

            def cut(layer: int, s: int = splits, t: int = tokens, w: int = warps, d: int = stages, q: Any = query,
                    b: Any = batch) -> Any:  # fmt: skip
                return split_attention(
                    q, *(side.codes for side in pool.layer(layer)), b.block_tables, b.kv_lengths, scale,
                    splits=s, tokens=t, warps=w, stages=d, pdl=True,
                )  # fmt: skip

            arms[f"splits {splits} tokens {tokens} warps {warps} stages {stages}"] = cut
        found = {}
        for name, arm in arms.items():
            arm(0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for layer in bench.group.layers:
                    arm(layer)
            found[name] = _time(graph.replay, 5) / len(bench.group.layers)
        print(f"  {size} x {length}")
        for name in sorted(found, key=lambda name: found[name])[:6]:
            print(f"    {1e6 * found[name]:.1f} us {nbytes / found[name] / 1e12:.2f} TB/s {name}", flush=True)


def _time(run: Any, repeats: int = 9) -> float:
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    marks[-1].synchronize()
    return median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1000


def ragged(bench: Bench) -> None:
    """Attention of sequences of 100 to 2048 tokens, uniformly random, which begin as they stand or the longest first."""
    from kvsuite.nanovllm.split_attention import longest_first, split_attention

    pool = bench.pool(256 * 1100)
    scale = bench.group.head_dim**-0.5
    for size in (8, 32, 64, 128, 256):
        lengths = bench.rng.integers(100, 2049, size)
        starts = np.concatenate([[0], np.cumsum(-(-lengths // BLOCK))])
        blocks = 1 + bench.rng.permutation(pool.num_blocks)
        tables = np.zeros((size, 128), dtype=np.int32)
        for row in range(size):
            tables[row, : starts[row + 1] - starts[row]] = blocks[starts[row] : starts[row + 1]]
        batch = bench.batch(BatchBuilder(bench.device), tables, lengths, np.ones(size, dtype=np.int64))
        query = torch.randn(size, bench.heads, bench.group.head_dim, dtype=bench.loaded.dtype, device=bench.device)
        order = longest_first(batch.kv_lengths, torch.empty_like(batch.kv_lengths))
        arms: dict[str, Any] = {}
        for splits, (words, places) in itertools.product((1, 2, 4, 8, 16), (("", None), (" longest first", order))):

            def cut(layer: int, s: int = splits, o: Any = places, q: Any = query, b: Any = batch) -> Any:
                return split_attention(
                    q, *(side.codes for side in pool.layer(layer)), b.block_tables, b.kv_lengths, scale,
                    splits=s, order=o, pdl=True,
                )  # fmt: skip

            arms[f"splits {splits}{words}"] = cut
        nbytes = int(lengths.sum()) * bench.group.token_bytes(2) / len(bench.group.layers)
        texts = []
        for name, arm in arms.items():
            arm(0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for layer in bench.group.layers:
                    arm(layer)
            seconds = _time(graph.replay, 5) / len(bench.group.layers)
            texts.append(f"{name} {1e6 * seconds:.1f} us {nbytes / seconds / 1e12:.2f} TB/s")
        print(f"  {size} ragged: {'; '.join(texts)}", flush=True)


class Steps:
    """Greedy decoding from a cache of random keys: tokens stay on the device, the host launches ahead."""

    def __init__(self, bench: Bench, graphs: DecodeGraphs, pool: KVPool, size: int, length: int) -> None:
        self.step = graphs.step(size)
        tables = bench.tables(size, length + MARGIN, pool)
        lengths = np.full(size, length)
        given = bench.batch(BatchBuilder(bench.device), tables, lengths, np.ones(size, dtype=np.int64))
        graphs.run(given)
        self.lengths = given.groups[0].kv_lengths_host.clone()
        blocks = torch.from_numpy(tables).to(bench.device, torch.int64)
        self.slots = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=bench.device)).flatten(1)
        self.host: list[float] = []

    def advance(self) -> None:
        started = time.perf_counter()
        batch, part = self.step.batch, self.step.batch.groups[0]
        batch.ids.copy_(self.step.logits.argmax(dim=-1))
        batch.positions.add_(1)
        part.kv_lengths.add_(1)
        part.slots.copy_(self.slots[:, int(self.lengths[0])])
        self.lengths += 1
        self.step.replay()
        self.host.append(time.perf_counter() - started)


def steps(bench: Bench) -> None:
    """Milliseconds of a decode step, of a blocking one (the host waits for each), and of the host's part; with ablations."""
    bandwidth = copy_bandwidth(bench.device)
    decoder = FusedDecoder(bench.loaded.model, bench.config, 8192)
    pool = bench.pool(max(b * (n + MARGIN + BLOCK) for b, n in bench.cases))
    owner = KernelAttention([pool], query_heads=bench.heads, libraries=libraries_for([pool], build=True))
    buckets = {rows_bucket(b) for b, _ in bench.cases if b <= MOST_ROWS}
    _warm_kernels([(t, r, g) for t in CANDIDATES for r in buckets for g in (False, True) if not g or t.splits == 1])
    started = time.perf_counter()
    chosen = choose_tilings(decoder, [b for b, _ in bench.cases])
    for (product, rows), seconds in chosen.items():
        floor = decoder.weights(product)[0].nbytes / bandwidth
        print(f"  {product} {rows}: {1e6 * seconds:.1f} us ({floor / seconds:.0%}) {decoder.tilings[product, rows]}")
    print(f"  chosen in {time.perf_counter() - started:.1f} s; copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    most = max(-(-(n + MARGIN) // BLOCK) for _, n in bench.cases)
    best, overlap = decoder.tilings, decoder.pdl
    short = fused_layers.MOST_SHORT
    variants: dict[str, tuple[Any, bool, int]] = {"default": (best, overlap, short)}
    if bench.options.ablations:
        variants |= {
            "torch products": ({}, overlap, short),
            "no overlap": (best, False, short),
            "five kernels a layer": (best, overlap, MOST_ROWS),
            "nine kernels a layer": (best, overlap, 0),
        }
    arms: dict[tuple[Any, str], Steps] = {}
    for name, (decoder.tilings, decoder.pdl, fused_layers.MOST_SHORT) in variants.items():
        arms |= {(case, name): Steps(bench, DecodeGraphs(decoder.logits, owner, case[:1], most), pool, *case)
                 for case in bench.cases}  # fmt: skip
    times: dict[Any, list[float]] = {arm: [] for arm in arms}
    blocking: dict[Any, list[float]] = {arm: [] for arm in arms}
    for _ in range(2):
        for key, arm in arms.items():
            times[key].append(_time(arm.advance, 11))
            for _ in range(5):
                torch.cuda.synchronize()
                began = time.perf_counter()
                arm.advance()
                torch.cuda.synchronize()
                blocking[key].append(time.perf_counter() - began)
    for ((size, length), name), found in sorted(times.items()):
        floor = (decoder.weight_bytes + size * (length + 16) * bench.group.token_bytes(2)) / bandwidth
        key = ((size, length), name)
        print(f"  {size} x {length} {name}: step {1e3 * min(found):.2f}..{1e3 * max(found):.2f} ms, floor {1e3 * floor:.2f}, "
              f"share {floor / median(found):.1%}, blocking {1e3 * median(blocking[key]):.2f} ms, "
              f"host {1e3 * median(arms[key].host[1:]):.2f} ms, {arms[key].step.attention.kinds[0]}", flush=True)  # fmt: skip
    if bench.options.profile:
        for (case, name), arm in arms.items():
            if name == "default":
                _profile(case, arm)


def _profile(case: Any, arm: Steps) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        arm.advance()
        torch.cuda.synchronize()
    print(f"  profile of {case}")
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    for row in rows[:10]:
        if row.self_device_time_total > 0:
            print(f"    {row.self_device_time_total / 1e3:8.3f} ms {row.count:5d} x {row.key[:70]}", flush=True)


def prefill(bench: Bench) -> None:
    """Tokens a second of prompts, in steps of several budgets."""
    decoder = FusedDecoder(bench.loaded.model, bench.config, 8192)
    pool = bench.pool(1 << 15)
    owners = {name: KernelAttention([pool], query_heads=bench.heads, libraries=Libraries(name)) for name in (FA2, FA3)}
    for (size, length), (name, owner) in itertools.product(((1, 3968), (4, 3968), (16, 960)), owners.items()):
        tables = bench.tables(size, length, pool)
        batch = bench.batch(BatchBuilder(bench.device), tables, np.full(size, length), np.full(size, length))

        def once(owner: Any = owner, batch: StepBatch = batch) -> None:
            owner.begin(batch)
            decoder.logits(batch, owner)

        seconds = _time(once, 5)
        print(f"  {size} x {length} {name}: {1e3 * seconds:.1f} ms, {size * length / seconds:.0f} tok/s", flush=True)
        if bench.options.profile and size > 2:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                once()
                torch.cuda.synchronize()
            for row in sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)[:9]:
                print(f"    {row.self_device_time_total / 1e3:8.3f} ms {row.count:5d} x {row.key[:70]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", nargs="+", choices=["check", "products", "attention", "ragged", "steps", "prefill"])
    parser.add_argument("--model", default="dummy:Qwen3-8B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cases", default="1x3968,16x3968,64x960,64x3968,128x3968")
    parser.add_argument("--rows", default="1,64,128")
    parser.add_argument("--ablations", action="store_true", help="steps: also without what was chosen")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    bench = Bench(options)
    for command in options.command:
        started = time.perf_counter()
        print(f"{command} {options.model} {options.dtype}", flush=True)
        globals()[command](bench)
        # wrappers and decoders hold cycles, and a pool is most of the memory
        gc.collect()
        torch.cuda.empty_cache()
        print(f"  [{time.perf_counter() - started:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
