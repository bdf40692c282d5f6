"""Decode steps and prompts against the floor, their kernels, the figure, a static cache: parts of nano_serving.py."""

from __future__ import annotations

import random
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from nano_session import BLOCK, Session, serving
from nano_steps import Decoding, long_limits, scatter

from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters


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
            prompts(session, runtime, batch, length)
        profile_of(session, runtime)


def prompts(session: Session, runtime: Runtime, batch: int, length: int) -> None:
    """Prompts of one step, to their first token: the median of three rounds, and what of it is before and behind the model."""
    run = runtime.runner.run
    marks: list[Any] = []

    def mark() -> None:
        if session.device.type == "cuda":
            event: Any = torch.cuda.Event
            marks.append(event(enable_timing=True))
            marks[-1].record()

    def marked(batch: Any) -> torch.Tensor:
        mark()
        logits = run(batch)
        launched.append(time.perf_counter())
        mark()
        return logits

    times, parts = [], []
    runtime.runner.run = marked
    try:
        for turn in range(4):
            content = random.Random(turn)
            for _ in range(batch):
                text = [content.randrange(runtime.vocab_size) for _ in range(length)]
                runtime.add(Request(text, SamplingParameters(max_new_tokens=1)))
            launched: list[float] = []
            marks.clear()
            session.synchronize()
            started = time.perf_counter()
            mark()
            runtime.run()
            mark()
            session.synchronize()
            times.append(time.perf_counter() - started)
            if marks:
                spans = [earlier.elapsed_time(later) for earlier, later in pairwise(marks)]
                parts.append((1e3 * (launched[0] - started), spans[0], sum(spans[1:-1]), spans[-1]))
    finally:
        runtime.runner.run = run
    seconds = median(times[1:])
    names = ("launched_after_ms", "before_model_ms", "model_ms", "behind_model_ms")
    found = {name: median(part[i] for part in parts[1:]) for i, name in enumerate(names)} if parts else {}
    session.say("prefill", batch=batch, prompt=length, ms=1e3 * seconds, tok_s=batch * length / seconds, **found)


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
