"""A session on the tiny dummy model, shared by the tests that only read from it, and cases for it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from shared_weights import share

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.meters.clock import Clock

LAYERS, VOCAB, TOKEN_BYTES = 4, 512, 4 * 2 * 2 * 16 * 4


def case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "suite": "compression", "engine": "hf", "model": "dummy:tiny", "name": "baseline", "device": "cpu",
        "dtype": "float32",
    }  # fmt: skip
    return Case(**(fields | changes))


def streaming(total: int, *, sinks: int = 4, **common: Any) -> Case:
    parameters = {"start_size": sinks, "recent_size": total - sinks} | common
    return case(name=f"streaming_{total}", policy="streaming_llm", policy_params=parameters)


@functools.cache
def session() -> HfSession:
    """Weights are widened tenfold: with the usual ones attention is flat, and nothing that a cache does would show."""
    built = HfSession(case(), EngineSettings(threads=1))
    with torch.no_grad():
        for name, weight in built.decoder.model.named_parameters():
            if "norm" not in name and "embed" not in name:
                weight.mul_(8)
    share("hf_sessions.session()", built.decoder.model)
    return built


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    return found


class CountingClock(Clock):
    """Stamps are numbers that the test supplies, and every mark notes what ``count`` says then."""

    name = "counting"

    def __init__(self, count: Any = lambda: 0) -> None:
        self._count = count
        self.counts: list[int] = []
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        self.counts = []
        self.at_start = self._count()

    def mark(self) -> None:
        self.counts.append(self._count())

    def seconds(self) -> list[float]:
        return [float(i + 1) for i in range(len(self.counts))]
