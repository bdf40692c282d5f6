"""Where the host's time of a decode step goes, by section: a part of nano_serving.py."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from nano_session import BLOCK, Session, serving
from nano_steps import Decoding, long_limits, scatter

from kvsuite.nanovllm.runtime import Runtime


class Sections:
    """Seconds in some methods of a runtime's parts, by step; a section inside another one is counted in both."""

    def __init__(self, runtime: Runtime) -> None:
        work, runner = runtime._launcher, runtime.runner
        builder = work._inputs._builder
        graphs = getattr(runner, "graphs", None)
        self._places: list[tuple[Any, str, str]] = [
            (runtime.scheduler, "plan", "plan"),
            (work._inputs, "build", "inputs"),
            (builder, "build", "inputs: tensors"),
            (builder, "_send", "inputs: sent"),
            (runner, "run", "runner"),
            (work, "commit", "commit"),
            (runtime._delivery, "land", "deliver, waiting included"),
            (runtime, "_finish", "finish"),
            (runtime._delivery, "take_off", "take off"),
        ]
        for step in {} if graphs is None else graphs._steps.values():
            self._places.append((step, "replay", "runner: replay"))
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)

    @contextmanager
    def watching(self) -> Iterator[None]:
        for owner, method, name in self._places:
            setattr(owner, method, self._timed(getattr(owner, method), name))
        try:
            yield
        finally:
            for owner, method, _ in self._places:
                delattr(owner, method)

    def end_step(self, **more: float) -> None:
        self.steps.append(dict(self._now) | more)
        self._now.clear()

    def medians_ms(self) -> dict[str, float]:
        names = {name: None for step in self.steps for name in step}
        return {name: 1e3 * median(step.get(name, 0.0) for step in self.steps) for name in names}

    def _timed(self, method: Any, name: str) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                self._now[name] += time.perf_counter() - started

        return timed


def host(session: Session) -> None:
    """The host's part of a step at the largest batch, by section, at a short and a long context."""
    shapes = session.shapes
    batch, lengths = shapes.hosted
    longest = max(lengths) + shapes.margin
    limits = long_limits(session, [batch], longest, batch * -(-longest // BLOCK))
    with serving(session, shapes.large, sizes=[batch], **limits) as runtime:
        scatter(runtime)
        for length in lengths:
            if batch * -(-(length + shapes.margin) // BLOCK) > runtime.num_blocks:
                session.say("host", batch=batch, context=length, skipped="the pool is too small")
                continue
            decoding = Decoding(session, runtime, batch, length)
            for overlap in (True, False):
                runtime.overlap = overlap
                if not overlap:
                    runtime._settle()
                decoding.time(2)
                # as it runs, then once more with stamps in it
                plain = min(decoding.time(shapes.steps // 2)[1] for _ in range(2))
                sections = Sections(runtime)
                with sections.watching():
                    for _ in range(shapes.steps // 2):
                        waited, started = runtime.waited_s, time.perf_counter()
                        runtime.step()
                        spent = time.perf_counter() - started
                        sections.end_step(all=spent - (runtime.waited_s - waited), waited=runtime.waited_s - waited)
                found = {name: round(value, 4) for name, value in sections.medians_ms().items()}
                session.say(
                    "host",
                    batch=batch,
                    context=length,
                    overlap=overlap,
                    host_ms=1e3 * plain,
                    median_ms_by_section=found,
                )
            runtime.overlap = True
            decoding.end()
