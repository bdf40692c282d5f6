"""The one matrix of policies. A new policy is one new file in kvsuite/compression and one line here.

Each line says what the policy keeps in plain Python, written from the papers and not from the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kvsuite.compression import Policy, get_policy

Kept = Callable[[int, Sequence[float]], Sequence[int]]


@dataclass(frozen=True)
class Line:
    """One policy with small sizes.

    ``kept(n, norms)`` gives the places, in time order, that stay of ``n`` stored tokens with these key norms; ``None``
    where the choice is random. ``once``: acts only until it removed something; ``every``: acts after every so many tokens.
    """

    policy: str
    parameters: dict[str, Any]
    kept: Kept | None
    once: bool = False
    every: int = 1
    #: parameters under which nothing is ever removed
    unlimited: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        own = [str(v) for v in self.parameters.values() if isinstance(v, str)]
        return "-".join([self.policy, *own]).replace("=", "")

    def build(self, **common: Any) -> Policy:
        return get_policy(self.policy, **(self.parameters | common))


def recent(n: int, window: int) -> range:
    return range(max(0, n - window), n)


def sinks_and_recent(n: int, sinks: int, window: int) -> list[int]:
    return list(range(n)) if n <= sinks + window else [*range(sinks), *range(n - window, n)]


def ends(n: int, count: int, sinks: int) -> list[int]:
    """The first ``sinks`` of ``n`` tokens and the last ones, ``count`` together: one of them the last whatever the sinks."""
    return sinks_and_recent(n, min(sinks, count - 1), count - min(sinks, count - 1))


def smallest(n: int, score: Sequence[float], count: int, protected: int = 0) -> list[int]:
    """The ``protected`` youngest, and of the older ones those of lowest score; of equal ones the older."""
    zone = sorted(range(n - protected), key=lambda i: (score[i], i))
    return sorted(zone[: count - protected]) + list(range(n - protected, n))


def half(n: int, norms: Sequence[float], after: int) -> Sequence[int]:
    return range(n) if n <= after else smallest(n, norms, math.ceil(Fraction(n, 2)))


def fixed(n: int, score: Sequence[float], size: int, protected: int) -> Sequence[int]:
    return range(n) if n <= size else smallest(n, score, size, protected)


def negated(norms: Sequence[float]) -> list[float]:
    return [-x for x in norms]


MATRIX = (
    Line("recent_only", {"window": 12}, lambda n, norms: recent(n, 12), unlimited=(("window", 999),)),
    Line(
        "streaming_llm",
        {"start_size": 3, "recent_size": 9},
        lambda n, norms: sinks_and_recent(n, 3, 9),
        unlimited=(("recent_size", 999),),
    ),
    Line(
        "l2_compress",
        {"keep_ratio": 0.5, "prune_after": 14, "mode": "single_shot"},
        lambda n, norms: half(n, norms, 14),
        once=True,
        unlimited=(("prune_after", 999),),
    ),
    Line(
        "l2_compress",
        {"keep_ratio": 0.5, "prune_after": 14, "mode": "every_token"},
        lambda n, norms: half(n, norms, 14),
        unlimited=(("keep_ratio", 1.0),),
    ),
    Line(
        "l2_compress",
        {"keep_ratio": 0.5, "prune_after": 14, "mode": "interval=5"},
        lambda n, norms: half(n, norms, 14),
        every=5,
        unlimited=(("prune_after", 999),),
    ),
    Line(
        "fix_size_l2",
        {"size": 12, "keep_ratio": 0.25, "strategy": "keep_low"},
        lambda n, norms: fixed(n, norms, 12, 3),
        unlimited=(("size", 999),),
    ),
    Line(
        "fix_size_l2",
        {"size": 12, "keep_ratio": 0.0, "strategy": "keep_high"},
        lambda n, norms: fixed(n, negated(norms), 12, 0),
        unlimited=(("size", 999),),
    ),
    Line(
        "fix_size_l2",
        {"size": 12, "keep_ratio": 0.25, "strategy": "random", "seed": 5},
        None,
        unlimited=(("size", 999),),
    ),
)


def strided(n: int, count: int) -> list[int]:
    return [i for i in range(n) if i % max(1, n // count) == 0][:count]


#: at the end of the prompt, by a factor of 3
FACTOR_MATRIX = (
    Line("recent_only", {"factor": 3.0}, lambda n, norms: recent(n, max(1, n // 3))),
    Line("streaming_llm", {"start_size": 3, "factor": 3.0}, lambda n, norms: ends(n, max(1, n // 3), 3)),
    Line("l2_compress", {"factor": 3.0}, lambda n, norms: smallest(n, norms, max(1, n // 3))),
    Line(
        "fix_size_l2",
        {"keep_ratio": 0.5, "strategy": "keep_low", "factor": 3.0},
        lambda n, norms: smallest(n, norms, max(1, n // 3), max(1, n // 3) // 2),
    ),
    Line("uniform_stride", {"factor": 3.0}, lambda n, norms: strided(n, max(1, n // 3))),
)


# policies that look at a complete prompt


@dataclass(frozen=True)
class PromptLine:
    """One policy that ranks a prompt's tokens; ``press`` is the press of kvpress that keeps the same, with its arguments."""

    policy: str
    parameters: dict[str, Any]
    press: str | None = None
    press_parameters: dict[str, Any] = field(default_factory=dict)
    #: youngest and oldest tokens that stay whatever is attended to, of ``kept`` ones
    recent: Callable[[int], int] = lambda kept: 0
    sinks: int = 0

    @property
    def id(self) -> str:
        return self.policy

    def build(self, **common: Any) -> Policy:
        return get_policy(self.policy, **(self.parameters | common))


PROMPT_MATRIX = (
    PromptLine("snapkv", {"window": 4}, "SnapKV", {"window_size": 4}, recent=lambda kept: 4),
    PromptLine("tova", {}, "TOVA", recent=lambda kept: 1),
    PromptLine("knorm", {}, "Knorm"),
    PromptLine(
        "expected_attention",
        {"future": 32, "sinks": 3},
        "ExpectedAttention",
        {"n_future_positions": 32, "n_sink": 3},
        sinks=3,
    ),
    # kvpress' ObservedAttention divides by the number of queries that could see a token, and protects none
    PromptLine("h2o", {"recent_share": 0.25}, recent=lambda kept: kept // 4),
)
