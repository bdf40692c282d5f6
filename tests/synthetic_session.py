"""An engine whose every number is known: a scripted clock that only its work moves, losses and caches as told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.engines.registry import SessionPool
from kvsuite.engines.results import MemoryPass, Served, ServeRequest
from kvsuite.measure.runner import CaseRunner, Measured
from kvsuite.meters.clock import Clock
from kvsuite.meters.memory import Phase, Reading
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.suites.registry import suite_named

ENVIRONMENT = {
    "host": {"os": "Linux", "cpu": "scripted", "cores": 1},
    "packages": {"torch": "0", "transformers": "0"},
}


class ScriptedClock(Clock):
    """Stands still unless `advance` is called."""

    name = "scripted"

    def __init__(self) -> None:
        self.now = 1000.0
        self._stamps: list[float] = []

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def start(self) -> None:
        self._stamps = [self.now]

    def mark(self) -> None:
        self._stamps.append(self.now)

    def seconds(self) -> list[float]:
        return [stamp - self._stamps[0] for stamp in self._stamps[1:]]


def no_fault(where: str) -> None:
    """The engine works."""


@dataclass
class Script:
    """What the engine will do.

    ``prefill``, ``first`` and ``gaps`` are seconds: the prompt's forward, from there to the first token, then chunk by
    chunk. ``chunks`` are tokens a chunk. ``nll`` is the loss of every scored token by the case's cache, ``nll_full`` by the
    full one. ``fault`` is called with the name of each pass and may raise.
    """

    prefill: float = 0.5
    first: float = 0.25
    gaps: Sequence[float] = (0.125, 0.25, 0.125)
    chunks: Sequence[int] | None = None
    round_factors: Sequence[float] = ()
    nll: Callable[[int], float] = lambda position: 2.0
    nll_full: Callable[[int], float] = lambda position: 2.0
    hit: Callable[[int], bool] = lambda position: position % 4 == 0
    is_dummy: bool = False
    peaks: tuple[int | None, int | None] = (900, 800)
    compress_s: float | None = None
    fault: Callable[[str], None] = no_fault


class SyntheticSession(Session):
    """Runs a `Script`."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.scripted_clock = ScriptedClock()
        self.calls: list[tuple[Any, ...]] = []
        self._rounds = 0
        self.model = {
            "label": "synthetic", "kind": "dummy", "revision": "sha256:weights", "weights_bytes": 10_000,
            "step_weight_bytes": 8_000, "trained_length": 64, "is_dummy": script.is_dummy,
        }  # fmt: skip

    device = property(lambda self: torch.device("cpu"))
    dtype_name = property(lambda self: "float16")
    vocab_size = property(lambda self: 256)
    bandwidth = property(lambda self: 1_000.0)
    ratio_requested = property(lambda self: None)

    @property
    def tokenizer(self) -> Any:
        """One token a byte; a dummy has none."""
        if self.script.is_dummy:
            return None
        return lambda text, verbose=False: {"input_ids": list(text.encode())}

    def prepare(self, case: Case) -> None:
        self._note("prepare", case.name)
        self.effective = {"dtype": "float16", "decode_step": "eager"}
        self.inert = {"threads": "the script has none"}

    def full_kv_bytes(self, tokens: int) -> int:
        return 10 * tokens

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int | None:
        return 60

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        [request] = requests
        prompt, new_tokens = request.prompt, request.new_tokens
        self._note("warm" if clock is None else "generate", tuple(prompt), new_tokens)
        if clock is None:
            return Served([], [[0] * new_tokens])
        script = self.script
        assert isinstance(clock, ScriptedClock)
        factor = 1.0
        if new_tokens > 1:
            factor = script.round_factors[self._rounds] if script.round_factors else 1.0
            self._rounds += 1
        clock.start()
        clock.advance(script.prefill * factor)
        clock.mark()
        clock.advance(script.first * factor)
        clock.mark()
        gaps = script.gaps if new_tokens > 1 else ()
        for gap in gaps:
            clock.advance(gap * factor)
            clock.mark()
        prefill_end, *times = clock.seconds()
        chunks = (script.chunks if new_tokens > 1 else None) or [1] * len(times)
        stamps = list(zip(times, chunks, strict=True))
        return Served([RequestTimes(len(prompt), len(prompt), stamps, prefill_end=prefill_end)], [[0] * new_tokens])

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        [request] = requests
        self._note("memory", tuple(request.prompt), request.new_tokens)
        reason = None if self.script.peaks[0] is not None else "no allocator"
        prefill, decode = (
            Phase(Reading(500 if reason is None else None, reason), Reading(peak, reason), Reading(1_000, reason))
            for peak in self.script.peaks
        )
        return MemoryPass(
            prefill=prefill, decode=decode, resident=Reading(5_000), driver=Reading(None, "no driver", {"scope": "device"}),
            kv_bytes_prefill=40, kv_bytes_decode=60, kv_bytes_allocated=80, lengths_prefill=[3, 5], lengths_decode=[4, 8],
            compress_s=self.script.compress_s, evict_s=None, warnings=["a warning of the pass"],
        )  # fmt: skip

    def score(self, tokens: Sequence[int], protocol: str, prefix: int, progress: Any = None) -> TokenScores:
        self._note("score", protocol, prefix, len(tokens))
        return self._scores(tokens, prefix + 1, self.script.nll)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        self._note("reference", first, len(tokens))
        return self._scores(tokens, first, self.script.nll_full)

    def _scores(self, tokens: Sequence[int], first: int, nll: Callable[[int], float]) -> TokenScores:
        positions = list(range(first, len(tokens)))
        return TokenScores(
            list(tokens[first:]), positions, [nll(p) for p in positions], [self.script.hit(p) for p in positions]
        )

    def finish(self) -> None:
        self._note("finish")

    def _note(self, name: str, *facts: Any) -> None:
        self.calls.append((name, *facts))
        self.script.fault(name)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]


class OnePool(SessionPool):
    """Hands out one session, whatever the case."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._only = session

    def get(self, case: Case) -> Session:
        return self._only


@dataclass
class Bench:
    """A runner around one synthetic session."""

    script: Script = field(default_factory=Script)
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = SyntheticSession(self.script)
        self.runner = CaseRunner(
            options=default_options(**({"rounds": "3", "num_warmup": "2"} | self.options)),
            registry=MetricRegistry(),
            environment=ENVIRONMENT,
            sessions=OnePool(self.session),
            suite=suite_named,
            clock=lambda device: self.session.scripted_clock,
        )

    def run(self, **changes: Any) -> Measured:
        return self.runner.run(case(**changes), "tests::case")


def case(**changes: Any) -> Case:
    workload = {
        "protocol": "streaming-decode", "corpus": "default", "num_samples": 1, "max_tokens": 41, "prompt_tokens": 20,
        "max_new_tokens": 4, "batch": 1,
    }  # fmt: skip
    fields: dict[str, Any] = {
        "suite": "compression", "engine": "hf", "model": "synthetic", "name": "streaming_8", "device": "cpu",
        "dtype": "float32",
    }  # fmt: skip
    return Case(**(fields | changes | {"workload": workload | changes.get("workload", {})}))


def perplexity_of(nll: Sequence[float]) -> float:
    return math.exp(math.fsum(nll) / len(nll))
