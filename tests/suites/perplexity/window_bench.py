"""The perplexity suite around a synthetic engine whose losses are known, for tests of its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic_session import ENVIRONMENT, OnePool, Script, SyntheticSession
from tiny_checkpoint import TEXT, byte_tokenizer

from kvsuite.case import Case
from kvsuite.engines.results import WindowScores
from kvsuite.errors import CaseSkipped
from kvsuite.measure.runner import CaseRunner, Measured
from kvsuite.meters.divergence import TokenDivergence
from kvsuite.meters.quality import TokenScores
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.suites.perplexity.cases import perplexity_cases
from kvsuite.suites.registry import suite_named
from kvsuite.workloads.windows import target_positions


def loss(position: int) -> float:
    return 1.0 + position % 3


class WindowSession(SyntheticSession):
    """Scores windows by a function of the position, and remembers what it was asked for."""

    def __init__(self, losses: Callable[[int], float] = loss, *, quantization: Any = None, **facts: Any) -> None:
        super().__init__(Script())
        self.losses, self.closed = losses, False
        self.scored: list[tuple[list[int], list[Any], str, int | None]] = []
        self.model |= {"quantization": quantization} | facts

    @property
    def tokenizer(self) -> Any:
        return byte_tokenizer()

    @property
    def vocab_size(self) -> int:
        return 258

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        self.effective["threads"] = 3

    def score_windows(
        self, tokens: Sequence[int], windows: Any, *, prefix: str, prefix_token: int | None, progress: Any = None
    ) -> WindowScores:
        self._note("score")
        self.scored.append((list(tokens), list(windows), prefix, prefix_token))
        positions = target_positions(windows)
        nll = [self.losses(p) for p in positions]
        if progress:
            progress(len(nll), len(nll), math.fsum(nll) / len(nll))
        scores = TokenScores([tokens[p] for p in positions], positions, nll, [p % 4 == 0 for p in positions])
        return WindowScores(scores, 7 * len(windows), 1, {"head": "split"})

    def compare_windows(
        self, reference: Any, tokens: Any, windows: Any, *, prefix: str, prefix_token: int | None, progress: Any = None
    ) -> TokenDivergence:
        self._note("compare")
        positions = target_positions(windows)
        ours, theirs = ([each.losses(p) for p in positions] for each in (self, reference))
        return TokenDivergence(ours, theirs, [0.25 * (p % 5) for p in positions], [p % 2 == 0 for p in positions])

    def close(self) -> None:
        self.closed = True


class Pool(OnePool):
    """Has a second session, or a reason why there is none."""

    def __init__(self, session: WindowSession, beside: WindowSession | str | None) -> None:
        super().__init__(session)
        self.second, self.asked = beside, []

    def beside(self, case: Case, **overrides: Any) -> Any:
        self.asked.append((case, overrides))
        if isinstance(self.second, str):
            raise CaseSkipped(self.second)
        return self.second


@dataclass
class Bench:
    """A runner around synthetic sessions, and the cases of a user's options on a small text."""

    folder: Path
    session: WindowSession = field(default_factory=WindowSession)
    beside: WindowSession | str | None = None
    options: dict[str, str] = field(default_factory=dict)
    text: str = TEXT

    def __post_init__(self) -> None:
        path = self.folder / "text.txt"
        path.write_text(self.text, newline="")
        small = {
            "device": "cpu", "dataset": str(path), "max_length": "32", "stride": "16", "rounds": "2", "num_warmup": "1",
            "prompt_tokens": "8", "max_new_tokens": "4", "quantization": "none",
        }  # fmt: skip
        options = default_options(**(small | self.options))
        self.cases = perplexity_cases(options)
        self.pool = Pool(self.session, self.beside)
        self.runner = CaseRunner(
            options,
            MetricRegistry(),
            ENVIRONMENT,
            self.pool,
            suite_named,
            clock=lambda device: self.session.scripted_clock,
            planned=self.cases,
        )
        self.said: list[tuple[Any, ...]] = []

    def run(self, index: int = 0) -> Measured:
        return self.runner.run(self.cases[index], "tests::case", progress=lambda *call: self.said.append(call))


def value(measured: Measured, name: str) -> Any:
    return measured.record.metrics[name]["value"]


N = len(TEXT.encode())
