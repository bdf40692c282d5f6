"""Properties that every policy of the matrix has, on any positions, scores and slot order."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_matrix import FACTOR_MATRIX, MATRIX, PROMPT_MATRIX, Line

from kvsuite.compression import CacheView, FixSizeL2, Policy, StreamingLLM, find_policy, get_policy, list_policies
from kvsuite.compression.ranked import highest, ranked

EVERY_LINE = pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in MATRIX])
HEADS = 3


def test_every_policy_has_a_line() -> None:
    # what merges keeps nothing by index: test_merging.py
    merging = {name for name in list_policies() if find_policy(name).merges}
    assert {line.policy for line in (*MATRIX, *PROMPT_MATRIX, *FACTOR_MATRIX)} == set(list_policies()) - merging


@EVERY_LINE
def test_parameters_go_around(line: Line) -> None:
    policy = line.build(positions="cache", skip_layers=[0, 3])
    again = get_policy(line.policy, **policy.to_dict())
    assert again.to_dict() == policy.to_dict()
    assert policy.to_dict().items() >= line.parameters.items()
    assert (policy.to_dict()["positions"], policy.to_dict()["skip_layers"]) == ("cache", [0, 3])


@st.composite
def caches(draw: Any, *, least: int = 1, most: int = 40) -> CacheView:
    """Stored tokens of a layer: any ascending positions, any norms (ties among them), slots in any order per head."""
    n = draw(st.integers(least, most))
    gaps = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    positions = torch.tensor(gaps).cumsum(0) - 1
    norms = draw(st.lists(st.integers(1, 12), min_size=HEADS * n, max_size=HEADS * n))
    scores = torch.tensor(norms, dtype=torch.float32).reshape(HEADS, n)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(HEADS)])
    return CacheView(
        positions.expand(HEADS, n).gather(-1, order),
        int(positions[-1]),
        scores.gather(-1, order),
        layer=draw(st.integers(0, 40)),
        heads=torch.arange(HEADS),
        step=draw(st.integers(1, 2000)),
    )


def for_policy(policy: Policy, cache: CacheView) -> CacheView:
    """The view as an engine hands it over: one row of positions and no scores where one decision serves every head."""
    if not policy.shared_across_heads:
        return cache
    return CacheView(cache.positions[0], cache.newest, layer=cache.layer, step=cache.step)


def kept_positions(policy: Policy, cache: CacheView) -> list[list[int]]:
    cache = for_policy(policy, cache)
    return [
        row.tolist()
        for row in cache.positions.gather(-1, policy.keep(cache)).reshape(-1, policy.size_after(cache.length))
    ]


@EVERY_LINE
@settings(max_examples=60)
@given(cache=caches())
def test_what_stays(line: Line, cache: CacheView) -> None:
    policy = line.build()
    size = policy.size_after(cache.length)
    rows = kept_positions(policy, cache)
    for head, row in enumerate(rows):
        assert len(row) == size <= cache.length
        assert all(earlier < later for earlier, later in itertools.pairwise(row))
        stored = sorted(cache.positions[head].tolist())
        assert set(row) <= set(stored)
        if line.kept is not None and size < cache.length:
            assert cache.scores is not None
            in_time = cache.scores[head][cache.positions[head].argsort()].tolist()
            # the protected tokens of fix_size_l2 are the last logical positions; here some of those may be gone
            if line.policy != "fix_size_l2":
                assert row == [stored[i] for i in line.kept(len(stored), in_time)]
        if isinstance(policy, FixSizeL2):
            assert {p for p in stored if p > cache.newest - policy.protected_of(policy.size)} <= set(row)
        if isinstance(policy, StreamingLLM):
            assert row[: policy.start_size] == stored[: policy.start_size]
            assert row[-policy.recent_size :] == stored[-policy.recent_size :]


@EVERY_LINE
@settings(max_examples=40)
@given(n=st.integers(1, 40), norms=st.lists(st.integers(1, 12), min_size=40, max_size=40))
def test_the_matrix_says_the_same(line: Line, n: int, norms: list[int]) -> None:
    if line.kept is None:
        pytest.skip("a random choice has no list")
    policy = line.build()
    scores = torch.tensor([norms[:n]], dtype=torch.float32)
    found = policy.keep(
        for_policy(policy, CacheView(torch.arange(n)[None], n - 1, scores, heads=torch.arange(1), step=n))
    )
    assert found.reshape(-1).tolist() == list(line.kept(n, [float(x) for x in norms[:n]]))


@EVERY_LINE
@settings(max_examples=40)
@given(data=st.data())
def test_the_victim_is_the_complement(line: Line, data: Any) -> None:
    # whether exactly one goes is the policy's answer; ratios remove one at a time only at some lengths
    policy = line.build()
    lengths = [n for n in range(1, 41) if policy.size_after(n) == n - 1]
    if not lengths:
        lengths, policy = [15], line.build(keep_ratio=0.9)
        assert policy.size_after(15) == 14
    n = data.draw(st.sampled_from(lengths))
    cache = for_policy(policy, data.draw(caches(least=n, most=n)))
    victim, keep = policy.victim(cache), policy.keep(cache)
    assert victim.shape == keep.shape[:-1]
    whole = torch.cat([keep, victim[..., None]], dim=-1).sort(-1).values
    assert torch.equal(whole, torch.arange(n).expand_as(whole))


@EVERY_LINE
@settings(max_examples=40)
@given(cache=caches(), seed=st.integers(0, 1000))
def test_slot_order_does_not_matter(line: Line, cache: CacheView, seed: int) -> None:
    policy = line.build()
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randperm(cache.length, generator=generator).expand(HEADS, -1)
    assert cache.scores is not None
    other = CacheView(
        cache.positions.gather(-1, shared),
        cache.newest,
        cache.scores.gather(-1, shared),
        layer=cache.layer,
        heads=cache.heads,
        step=cache.step,
    )
    assert kept_positions(policy, cache) == kept_positions(policy, other)


@EVERY_LINE
@settings(max_examples=40)
@given(cache=caches(), order=st.permutations(range(HEADS)))
def test_heads_are_independent(line: Line, cache: CacheView, order: list[int]) -> None:
    policy = line.build()
    assert cache.scores is not None
    assert isinstance(cache.heads, torch.Tensor)
    swapped = CacheView(
        cache.positions[order],
        cache.newest,
        cache.scores[order],
        layer=cache.layer,
        heads=cache.heads[order],
        step=cache.step,
    )
    rows, moved = kept_positions(policy, cache), kept_positions(policy, swapped)
    if policy.shared_across_heads:
        assert rows == moved
    else:
        assert [rows[head] for head in order] == moved


@EVERY_LINE
def test_layers_are_decided_together_as_one_by_one(line: Line) -> None:
    policy = line.build()
    if policy.shared_across_heads:
        pytest.skip("one decision serves every layer")
    layers, batch, n = torch.tensor([0, 2, 5]), 2, 23
    scores = torch.rand(3, batch, HEADS, n, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(n).expand(scores.shape)
    together = policy.keep(
        CacheView(positions, n - 1, scores, layer=layers[:, None, None], heads=torch.arange(HEADS), step=n)
    )
    for index, layer in enumerate(layers.tolist()):
        alone = policy.keep(
            CacheView(positions[0], n - 1, scores[index], layer=layer, heads=torch.arange(HEADS), step=n)
        )
        assert torch.equal(together[index], alone)


@EVERY_LINE
def test_sequences_are_decided_together_as_one_by_one(line: Line) -> None:
    policy = line.build()
    if not policy.sequences_apart:
        pytest.skip("it says that it is shown one sequence at a time")
    generator = torch.Generator().manual_seed(2)
    sequences, layers = 3, torch.tensor([0, 4])
    # as many as it takes to lose one token, and many more
    first = next((n for n in range(2, 200) if policy.size_after(n) == n - 1), 23)
    for n in (first, first + 17):
        shape = (sequences, n) if policy.shared_across_heads else (sequences, len(layers), HEADS, n)
        positions = torch.stack([torch.randperm(2 * n, generator=generator)[:n] for _ in range(math.prod(shape[:-1]))])
        positions = positions.view(shape)
        scores = None if policy.shared_across_heads else torch.rand(shape, generator=generator).mul(9).round()
        steps = torch.tensor([2 * n, 3 * n, 5 * n]).view(-1, *[1] * (len(shape) - 2))
        where: dict[str, Any] = {} if scores is None else {"layer": layers[:, None], "heads": torch.arange(HEADS)}
        together = CacheView(positions, steps[..., None] - 1, scores, step=steps, **where)
        for index, step in enumerate(steps.flatten().tolist()):
            own = None if scores is None else scores[index]
            alone = CacheView(positions[index], step - 1, own, step=step, **where)
            assert torch.equal(policy.keep(together)[index], policy.keep(alone))
            if policy.size_after(n) == n - 1:
                assert torch.equal(policy.victim(together)[index], policy.victim(alone))


@given(size=st.sampled_from([1, 2, 4, 5, 8, 10, 16]), data=st.data(), n=st.integers(1, 30), every_token=st.booleans())
def test_equal_norms_make_it_streaming(size: int, data: Any, n: int, every_token: bool) -> None:
    """Of equal norms the older stays, so that the zone keeps its first tokens: attention sinks."""
    protected = data.draw(st.integers(1, size))
    fixed = FixSizeL2(size=size, keep_ratio=protected / size)
    assert fixed.protected_of(fixed.size) == protected
    streaming = StreamingLLM(start_size=size - protected, recent_size=protected)
    norms = [1.0] * n
    assert simulate(fixed, norms, every_token=every_token) == simulate(streaming, norms, every_token=every_token)


def simulate(policy: Policy, norms: list[float], *, every_token: bool) -> list[int]:
    """Positions that are left after all tokens came, with the policy applied after each or once at the end."""
    stored: list[int] = []
    for position in range(len(norms)):
        stored.append(position)
        if every_token or position == len(norms) - 1:
            scores = torch.tensor([[norms[p] for p in stored]])
            view = CacheView(torch.tensor([stored]), position, scores, heads=torch.arange(1), step=position + 1)
            stored = [stored[i] for i in policy.keep(view)[0]]
    return stored


@settings(max_examples=40)
@given(norms=st.lists(st.integers(1, 10_000), min_size=1, max_size=40, unique=True))
@pytest.mark.parametrize("line", [pytest.param(m, id=m.id) for m in MATRIX if m.policy != "l2_compress" and m.kept])
def test_every_token_or_once_at_the_end(line: Line, norms: list[int]) -> None:
    policy = line.build()
    values = [float(x) for x in norms]
    assert simulate(policy, values, every_token=True) == simulate(policy, values, every_token=False)


@given(
    norms=st.lists(st.integers(1, 1000), min_size=13, max_size=40, unique=True), protected=st.sampled_from([0.0, 0.25])
)
def test_low_and_high_are_each_others_mirror(norms: list[int], protected: float) -> None:
    size = 12
    low = FixSizeL2(size=size, keep_ratio=protected)
    high = FixSizeL2(size=size, keep_ratio=protected, strategy="keep_high")
    n, values = len(norms), [float(x) for x in norms]
    kept_low, kept_high = (set(simulate(p, values, every_token=False)) for p in (low, high))
    safe = set(range(n - low.protected_of(n), n))
    assert safe <= kept_low & kept_high
    if size - low.protected_of(n) <= (n - low.protected_of(n)) // 2:
        assert kept_low & kept_high == safe
    mirrored = [1001.0 - x for x in values]
    assert kept_high == set(simulate(low, mirrored, every_token=False))


@given(data=st.data(), norms=st.lists(st.integers(1, 6), min_size=2, max_size=30))
def test_rounding_decides_no_rank(data: Any, norms: list[int]) -> None:
    """Equal norms as two engines compute them: a few units in the last place apart. The older stays, and the same one goes."""
    exact = torch.tensor([norms], dtype=torch.float32)
    units = data.draw(st.lists(st.integers(-2, 2), min_size=len(norms), max_size=len(norms)))
    rounded = exact * (1 + torch.tensor([units]) * 2**-23)
    assert torch.equal(ranked(-rounded), (-exact).argsort(dim=-1, descending=True, stable=True))
    places = torch.arange(len(norms))[None]
    policy, newest = FixSizeL2(size=max(len(norms) - 1, 1)), len(norms) - 1
    one, other = (policy.victim(CacheView(places, newest, scores)) for scores in (exact, rounded))
    assert torch.equal(one, other)


def test_protected_tokens_rank_first_in_time_order() -> None:
    infinite = float("inf")
    assert ranked(torch.tensor([1.0, infinite, 3.0, infinite])).tolist() == [1, 3, 2, 0]
    # what is not equal is ranked, however small it is
    assert ranked(torch.tensor([1e-9, 3e-9, 2e-9, 0.0])).tolist() == [1, 2, 0, 3]


@settings(max_examples=200)
@given(data=st.data(), n=st.integers(1, 30))
def test_the_highest_are_the_first_of_the_ranks(data: Any, n: int) -> None:
    """Ties, ties within rounding and infinities among them."""
    value = st.sampled_from([0.0, 1.0, 1.0 + 2**-21, 1.0 + 2**-19, 2.0, -3.0, float("inf")])
    rows = torch.tensor([data.draw(st.lists(value, min_size=n, max_size=n)) for _ in range(3)])
    count = data.draw(st.integers(1, n))
    assert torch.equal(highest(rows, count), ranked(rows)[..., :count].sort(dim=-1).values)
