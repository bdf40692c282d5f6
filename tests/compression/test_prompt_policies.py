"""Policies that look at a prompt: formulas by plain loops, chunks that change nothing, what stays."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsuite.compression import get_policy, prompt_view
from kvsuite.compression.base import Needs
from kvsuite.compression.prompt_view import PromptObservation, PromptView, attention_weights
from kvsuite.compression.ranked import ranked

HEADS, KV_HEADS, WIDTH = 4, 2, 8
NAMES = ("snapkv", "tova", "h2o", "knorm", "expected_attention")
ALL = Needs(prompt=True, queries=5, attention_sums=True, query_statistics=2)


def turn(vectors: Tensor, positions: Tensor, direction: int = 1) -> Tensor:
    """A rotary embedding of two-dimensional planes."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None].float() / 100 ** (torch.arange(half) / half)
    cos, sin = angles.cos(), direction * angles.sin()
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unturn(vectors: Tensor, positions: Tensor) -> Tensor:
    return turn(vectors, positions, -1)


def prompt(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, tokens, WIDTH), (KV_HEADS, tokens, WIDTH), (KV_HEADS, tokens, WIDTH))
    query, keys, values = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, keys, values


def observe(needs: Needs, query: Tensor, keys: Tensor, cuts: list[int]) -> PromptObservation:
    observed = PromptObservation(needs, unturn)
    for start, end in zip([0, *cuts], [*cuts, query.shape[1]], strict=True):

        def so_far(end: int = end) -> Tensor:
            return keys[:, :end]

        observed.add(query[:, start:end], so_far, WIDTH**-0.5)
    return observed


def view(name: str, tokens: int, cuts: list[int] | None = None, **parameters: object) -> tuple[PromptView, object]:
    policy = get_policy(name, **parameters)
    query, keys, values = prompt(tokens)
    observed = observe(policy.needs, query, keys, cuts or [])
    places = torch.arange(tokens).expand(KV_HEADS, tokens)
    return PromptView(places, tokens - 1, keys=keys, values=values, observed=observed, rotate=turn), policy


def by_loops(query: Tensor, keys: Tensor) -> Tensor:
    """Attention weights of a prompt, one query after the other."""
    weights = torch.zeros(HEADS, query.shape[1], query.shape[1], dtype=torch.float64)
    for head in range(HEADS):
        own = keys[head // (HEADS // KV_HEADS)].double()
        for at in range(query.shape[1]):
            products = [float(query[head, at].double() @ own[j]) / math.sqrt(WIDTH) for j in range(at + 1)]
            most = max(products)
            exponentials = [math.exp(x - most) for x in products]
            weights[head, at, : at + 1] = torch.tensor([x / sum(exponentials) for x in exponentials])
    return weights


def test_attention_and_its_sums_are_those_of_plain_loops() -> None:
    query, keys, values = prompt(11)
    expected = by_loops(query, keys)
    observed = observe(ALL, query, keys, [4, 5])
    seen = PromptView(torch.arange(11), 10, keys=keys, values=values, observed=observed)
    torch.testing.assert_close(seen.attention(5).double(), expected[:, -5:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen.attention_sums().double(), expected.sum(dim=1), atol=1e-6, rtol=1e-5)


def test_statistics_are_those_before_rotation() -> None:
    query, keys, _ = prompt(13)
    plain = unturn(query[None], torch.arange(13))[0][:, 2:]
    mean, covariance = observe(ALL, query, keys, [1, 3, 12]).statistics()
    torch.testing.assert_close(mean, plain.mean(dim=1))
    centred = plain - plain.mean(dim=1, keepdim=True)
    torch.testing.assert_close(covariance, centred.transpose(1, 2) @ centred / 11, atol=1e-6, rtol=1e-5)


@settings(max_examples=25)
@given(data=st.data(), tokens=st.integers(6, 40))
def test_chunks_change_nothing(data: st.DataObject, tokens: int) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=5)))
    query, keys, _ = prompt(tokens, seed=tokens)
    whole, cut = observe(ALL, query, keys, []), observe(ALL, query, keys, cuts)
    assert whole.last is not None
    assert cut.last is not None
    assert torch.equal(whole.last, cut.last)
    torch.testing.assert_close(whole.sums, cut.sums, atol=1e-5, rtol=1e-5)
    for one, other in zip(whole.statistics(), cut.statistics(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_as_many_stay_as_were_announced_in_time_order(name: str, ratio: float) -> None:
    seen, policy = view(name, 30, keep_ratio=ratio, **({"window": 3} if name == "snapkv" else {}))
    kept = policy.keep(seen)  # type: ignore[attr-defined]
    assert kept.shape == (KV_HEADS, policy.size_after(30))  # type: ignore[attr-defined]
    assert bool((kept.diff(dim=-1) > 0).all())
    if name in ("snapkv", "tova", "h2o") and ratio > 0.1:
        assert kept[:, -1].tolist() == [29, 29]


def test_snapkv_by_loops() -> None:
    seen, policy = view("snapkv", 20, keep_ratio=0.5, window=4, kernel=3)
    query, keys, _ = prompt(20)
    mean = by_loops(query, keys)[:, -4:, :16].mean(dim=1)
    padded = torch.nn.functional.pad(mean, (1, 1))
    pooled = torch.stack([padded[:, i : i + 3].mean(dim=1) for i in range(16)], dim=1)
    score = pooled.view(KV_HEADS, HEADS // KV_HEADS, 16).mean(dim=1)
    expected = [[*sorted(row.argsort(descending=True)[:6].tolist()), 16, 17, 18, 19] for row in score]
    assert policy.keep(seen).tolist() == expected  # type: ignore[attr-defined]


def test_h2o_keeps_heavy_hitters_beside_recent_tokens() -> None:
    seen, policy = view("h2o", 20, keep_ratio=0.5, recent_share=0.4)
    query, keys, _ = prompt(20)
    score = by_loops(query, keys).sum(dim=1).view(KV_HEADS, -1, 20).mean(dim=1)
    expected = [[*sorted(row[:16].argsort(descending=True)[:6].tolist()), 16, 17, 18, 19] for row in score]
    assert policy.keep(seen).tolist() == expected  # type: ignore[attr-defined]


def test_of_equal_tokens_the_older_stay() -> None:
    policy = get_policy("knorm", keep_ratio=0.5)
    keys = torch.ones(KV_HEADS, 6, WIDTH)
    seen = PromptView(torch.arange(6), 5, keys=keys, values=keys, observed=PromptObservation(policy.needs))
    assert policy.keep(seen).tolist() == [[0, 1, 2]] * KV_HEADS


def test_what_was_not_asked_for_is_not_there() -> None:
    seen, _ = view("tova", 8)
    with pytest.raises(RuntimeError, match="were not asked for"):
        seen.queries(2)
    with pytest.raises(RuntimeError, match="attention sums were not asked for"):
        seen.attention_sums()
    with pytest.raises(RuntimeError, match="ask for query_statistics"):
        seen.query_statistics()


def test_sizes_below_which_a_policy_is_something_else() -> None:
    snapkv = get_policy("snapkv", keep_ratio=0.3, window=64)
    assert "60 tokens stay, no more than the window of 64" in str(snapkv.caveat(200))
    assert snapkv.caveat(400) is None
    assert "64 tokens stay, no more" in str(get_policy("snapkv", factor=5).caveat(320)), "all of them are the window"
    assert "all of them lie in the window" in str(snapkv.caveat(50))
    assert "no more than the 4 sinks" in str(get_policy("expected_attention", keep_ratio=0.1).caveat(40))
    assert get_policy("streaming_llm").caveat(10) is None


@pytest.mark.parametrize(
    ("name", "parameters", "length", "told"),
    [
        ("h2o", {"keep_ratio": 0.5, "recent_share": 1.0}, 40, "20 tokens stay, all of them the most recent"),
        ("h2o", {"keep_ratio": 0.5}, 40, None),
        ("tova", {"keep_ratio": 0.02}, 60, "1 token stays, the last one"),
        ("tova", {"keep_ratio": 0.05}, 60, None),
        ("fix_size_l2", {"size": 32, "keep_ratio": 1.0}, 100, "all of the 32 tokens that stay are protected"),
        ("fix_size_l2", {"size": 32, "keep_ratio": 1.0}, 32, None),
        ("streaming_llm", {"start_size": 0, "recent_size": 32}, 100, "no sinks stay"),
        ("recent_only", {"window": 1}, 100, None),
    ],
)
def test_a_method_that_is_another_one_at_this_size_says_so(name, parameters, length, told) -> None:
    caveat = get_policy(name, **parameters).caveat(length)
    assert caveat is None if told is None else told in caveat


@pytest.mark.parametrize("chunks", [(40,), (13, 27)])
def test_sums_of_a_prompt_that_does_not_fit_one_block_are_those_of_one_that_does(chunks, monkeypatch) -> None:
    query, keys, _ = prompt(40)

    def sums() -> Tensor:
        observed = PromptObservation(Needs(prompt=True, attention_sums=True), None)
        for end in (sum(chunks[: index + 1]) for index in range(len(chunks))):
            start = observed._seen
            observed.add(query[:, start:end], lambda end=end: keys[:, :end], 0.3)
        assert observed.sums is not None
        return observed.sums

    whole = sums()
    monkeypatch.setattr(prompt_view, "_BLOCK_BYTES", 4 * HEADS * 40 * 7)
    torch.testing.assert_close(sums(), whole)
    torch.testing.assert_close(whole.sum(dim=1), torch.full((HEADS,), 40.0))


def test_a_group_of_query_heads_shares_its_key_head() -> None:
    query, keys, _ = prompt(9)
    wide = keys.repeat_interleave(HEADS // KV_HEADS, dim=0)
    torch.testing.assert_close(attention_weights(query, keys, 0.3, 0), attention_weights(query, wide, 0.3, 0))


@given(st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_norms_that_differ_by_rounding_are_ranked_by_age(size: float, seed: int) -> None:
    keys = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed)) * size
    # a rotation changes the last bits of a norm
    norms = turn(keys.expand(1, 1, 7, WIDTH), torch.arange(7) * 0.9)[0, 0].square().sum(dim=-1).sqrt()
    assert ranked(-norms).tolist() == list(range(7))
    assert ranked(-torch.cat([norms * 1.001, norms])).tolist() == [*range(7, 14), *range(7)]
