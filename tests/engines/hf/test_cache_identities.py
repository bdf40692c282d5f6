"""Equalities between policies on a cache (a budget beyond the text, special cases of one another), and their ends."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from policy_matrix import MATRIX, Line
from tiny_decoders import LAYERS, Fed, chunks_of, feed, model, text

from kvsuite.compression import FixSizeL2, L2Compress, RecentOnly, StreamingLLM

TOKENS = 30
KINDS = pytest.mark.parametrize("kind", ["llama", "neox"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["ring", "copy"])
POSITIONS = pytest.mark.parametrize("positions", ["original", "cache"])
PROMPTS = pytest.mark.parametrize("prompt", [1, 20])


@functools.cache
def full_cache(kind: str, implementation: str, prompt: int) -> Fed:
    return feed(kind, None, text(TOKENS), chunks_of(prompt, TOKENS), implementation=implementation)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("llama", "ring"),
        ("llama", "copy"),
        ("neox", "ring"),
        # what keeps the tensors knows no family of models
        pytest.param("neox", "copy", marks=pytest.mark.slow),
    ],
)
@PROMPTS
@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
def test_nothing_to_evict_is_the_full_cache(kind: str, implementation: str, prompt: int, line: Line) -> None:
    ids, chunks = text(TOKENS), chunks_of(prompt, TOKENS)
    baseline = full_cache(kind, implementation, prompt)
    every = tuple(range(LAYERS))
    for policy in (line.build(**dict(line.unlimited)), line.build(skip_layers=every)):
        fed = feed(kind, policy, ids, chunks, implementation=implementation)
        assert torch.equal(fed.logits, baseline.logits)
        assert fed.lengths == baseline.lengths
        for own, full in zip(fed.cache.layers, baseline.cache.layers, strict=True):
            assert torch.equal(own.keys, full.keys)
            assert torch.equal(own.values, full.values)
    # keys that were rotated back and forth are equal in float32, not in bits
    moved = feed(
        kind, line.build(positions="cache", **dict(line.unlimited)), ids, chunks, implementation=implementation
    )
    assert moved.lengths == baseline.lengths
    torch.testing.assert_close(moved.logits, baseline.logits, rtol=0, atol=1e-5)


@KINDS
@IMPLEMENTATIONS
def test_the_full_cache_is_one_forward(kind: str, implementation: str) -> None:
    ids = text(TOKENS)
    with torch.no_grad():
        whole = model(kind)(input_ids=ids, use_cache=False).logits[0]
    stepwise = feed(kind, None, ids, chunks_of(1, TOKENS), implementation=implementation).logits[:, 0]
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-5)
    chunked = feed(kind, None, ids, [16, 4, 1, 8, 1], implementation=implementation).logits[:, 0]
    torch.testing.assert_close(chunked, whole[[15, 19, 20, 28, 29]], rtol=0, atol=1e-5)


@KINDS
@PROMPTS
@POSITIONS
def test_special_cases_of_one_another(kind: str, prompt: int, positions: Any) -> None:
    ids, chunks = text(TOKENS), chunks_of(prompt, TOKENS)
    recent = feed(kind, RecentOnly(window=10, positions=positions), ids, chunks)
    streaming = feed(kind, StreamingLLM(start_size=0, recent_size=10, positions=positions), ids, chunks)
    assert torch.equal(streaming.logits, recent.logits)
    for strategy in ("keep_low", "keep_high", "random"):
        policy = FixSizeL2(size=10, keep_ratio=1, strategy=strategy, positions=positions)
        protected = feed(kind, policy, ids, chunks)
        torch.testing.assert_close(protected.logits, recent.logits, rtol=0, atol=1e-5)
        assert torch.equal(protected.kept(0), recent.kept(0).expand_as(protected.kept(0)))


@KINDS
@IMPLEMENTATIONS
def test_original_and_cache_agree_until_something_goes(kind: str, implementation: str) -> None:
    ids, chunks = text(TOKENS), chunks_of(1, TOKENS)
    by = {
        positions: feed(
            kind,
            StreamingLLM(start_size=4, recent_size=12, positions=positions),
            ids,
            chunks,
            implementation=implementation,
        )
        for positions in ("original", "cache")
    }
    difference = (by["original"].logits - by["cache"].logits).abs().amax(dim=(1, 2))
    # the first eviction moves every recent key by one place, which tells the sinks from them
    assert (difference[:17] <= 1e-5).all()
    assert (difference[17:] > 1e-3).all()


def test_recent_keys_alone_do_not_depend_on_the_handling_of_positions() -> None:
    # a rotation of all keys and the query by the same distance cancels: without sinks both handlings are one method
    ids, chunks = text(TOKENS), chunks_of(1, TOKENS)
    original, cache = (
        feed("llama", RecentOnly(window=10, positions=positions), ids, chunks).logits
        for positions in ("original", "cache")
    )
    torch.testing.assert_close(original, cache, rtol=0, atol=1e-5)


@IMPLEMENTATIONS
@POSITIONS
def test_defect_08_random_is_seeded(implementation: str, positions: Any) -> None:
    ids, chunks = text(TOKENS), chunks_of(20, TOKENS)

    def run(seed: int) -> Any:
        policy = FixSizeL2(size=12, keep_ratio=0.25, strategy="random", seed=seed, positions=positions)
        return feed("llama", policy, ids, chunks, implementation=implementation)

    torch.manual_seed(1)
    first = run(3)
    torch.manual_seed(2)
    again, other = run(3), run(4)
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.kept(0), other.kept(0))
    heads_of = first.kept(0)[0]
    assert not torch.equal(heads_of[0], heads_of[1])
    assert not torch.equal(first.kept(0), first.kept(1))


def test_l2_every_token_and_random_depend_on_when_they_are_applied() -> None:
    """Applied after every token they keep other tokens than applied once at the end; the other policies do not."""
    ids = text(33)
    for policy, same in (
        (RecentOnly(window=12), True),
        (StreamingLLM(start_size=3, recent_size=9), True),
        (FixSizeL2(size=12, keep_ratio=0.25), True),
        (FixSizeL2(size=12, keep_ratio=0.25, strategy="keep_high"), True),
        (FixSizeL2(size=12, keep_ratio=0.25, strategy="random"), False),
        (L2Compress(keep_ratio=0.4, prune_after=12, mode="every_token"), False),
    ):
        # the first layer's keys do not depend on what is kept
        stepwise = feed("llama", policy, ids, chunks_of(1, 33)).kept(0)
        at_once = feed("llama", policy, ids, [33]).kept(0)
        assert torch.equal(stepwise, at_once) is same, policy.name
