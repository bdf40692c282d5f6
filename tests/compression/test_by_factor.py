"""Compression by a factor: counts, what stays, what is refused, and that cases without a factor are what they were."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_matrix import FACTOR_MATRIX, Line

from kvsuite.compression import CacheView, FixSizeL2, L2Compress, StreamingLLM, get_policy
from kvsuite.compression.by_factor import ByFactor
from kvsuite.compression.knorm import KNorm
from kvsuite.compression.prompt_view import PromptObservation, PromptView
from kvsuite.compression.ratio import factor_count
from kvsuite.compression.uniform_stride import UniformStride
from kvsuite.errors import UserError

FACTORED = (
    "streaming_llm", "recent_only", "l2_compress", "fix_size_l2", "snapkv", "h2o", "tova", "knorm", "expected_attention",
)  # fmt: skip
LENGTHS = (10, 100, 1000, 3968, 4000, 4096)


def norms_of(n: int, heads: int = 2) -> torch.Tensor:
    return torch.rand(heads, n, generator=torch.Generator().manual_seed(n)) + 1


def view(n: int, *, heads: int | None = 2) -> CacheView:
    """A prompt of ``n`` tokens, with key norms where heads are given."""
    if heads is None:
        return CacheView(torch.arange(n), n - 1, step=n)
    return CacheView(torch.arange(n).expand(heads, n), n - 1, norms_of(n, heads), heads=torch.arange(heads), step=n)


def test_counts_are_whole_numbers_of_tokens() -> None:
    assert [factor_count(n, 5) for n in LENGTHS] == [2, 20, 200, 793, 800, 819]
    assert [factor_count(n, 5, kvpress_compat=True) for n in LENGTHS] == [1, 19, 199, 793, 799, 819]
    assert (factor_count(4000, 10), factor_count(4000, 10, kvpress_compat=True)) == (400, 399)
    assert (factor_count(3, 5), factor_count(3, 5, kvpress_compat=True)) == (1, 1)
    # 3 / 1.1 is 2.7272727272727275 and 11 / 1.1 is 9.999999999999998 in floats
    assert factor_count(11, 1.1) == 10


@given(length=st.integers(1, 5000), factor=st.integers(1, 64))
def test_a_whole_factor_divides(length: int, factor: int) -> None:
    assert factor_count(length, float(factor)) == max(1, length // factor)
    if factor in (2, 4, 8):
        assert factor_count(length, factor, kvpress_compat=True) == max(1, length // factor)


@pytest.mark.parametrize("name", FACTORED)
def test_every_policy_takes_a_factor(name: str) -> None:
    policy = get_policy(name, factor=5)
    assert [policy.size_after(n) for n in LENGTHS] == [2, 20, 200, 793, 800, 819]
    assert [get_policy(name, factor=5, rounding="kvpress_compat").size_after(n) for n in (10, 4000)] == [1, 799]
    assert policy.acts == "prompt"
    assert policy.due(step=10, done=False, prompt=True)
    assert not policy.due(step=11, done=False, prompt=False), "not while decoding"
    assert policy.ratio_requested == 0.8
    assert get_policy(name, factor=1).size_after(17) == 17
    assert get_policy(name, **policy.to_dict()).to_dict() == policy.to_dict()
    assert policy.parameters()["factor"] == 5
    assert isinstance(policy, ByFactor)
    assert not set(policy.sizes) & set(policy.parameters()), "sizes that decide nothing are no part of a case"


@pytest.mark.parametrize("name", FACTORED)
def test_without_a_factor_nothing_of_it_is_in_a_case(name: str) -> None:
    assert not {"factor", "rounding"} & set(get_policy(name).to_dict())


def test_cases_without_a_factor_are_what_they_were() -> None:
    common = {"positions": "original", "skip_layers": []}
    assert get_policy("snapkv").to_dict() == {"keep_ratio": 0.5, "window": 64, "kernel": 5} | common
    assert get_policy("streaming_llm").to_dict() == {"start_size": 4, "recent_size": 508} | common
    assert get_policy("fix_size_l2").to_dict() == {"size": 1024, "keep_ratio": 0.0, "strategy": "keep_low"} | common
    assert get_policy("l2_compress").to_dict() == {
        "keep_ratio": 1.0, "prune_after": 1000, "mode": "single_shot",
    } | common  # fmt: skip
    assert (get_policy("streaming_llm").acts, get_policy("snapkv").acts) == ("decode", "prompt")


@pytest.mark.parametrize("line", [pytest.param(line, id=line.id) for line in FACTOR_MATRIX])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 40, 101])
def test_what_stays_of_a_prompt(line: Line, n: int) -> None:
    policy = line.build()
    seen = view(n, heads=None if policy.shared_across_heads else 2)
    kept = policy.keep(seen).reshape(-1, policy.size_after(n)).tolist()
    assert line.kept is not None
    assert kept == [list(line.kept(n, row)) for row in norms_of(n).tolist()[: len(kept)]]
    assert policy.size_after(n) == max(1, n // 3)


@pytest.mark.parametrize(("length", "factor"), [(3968, 5.0), (100, 3.0), (23, 2.5)])
def test_streaming_by_factor_is_streaming_once_with_the_same_count(length: int, factor: float) -> None:
    by_factor = StreamingLLM(start_size=4, factor=factor)
    count = by_factor.size_after(length)
    by_size = StreamingLLM(start_size=4, recent_size=count - 4)
    seen = view(length, heads=None)
    assert by_factor.keep(seen).tolist() == by_size.keep(seen).tolist()


def test_knorm_by_factor_is_l2_once_with_the_same_count_and_keeps_the_smallest_norms_of_each_head() -> None:
    keys = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(3))
    norms = keys.square().sum(-1).sqrt()
    places = torch.arange(60).expand(2, 60)
    policy = KNorm(factor=5)
    seen = PromptView(places, 59, keys=keys, values=keys, observed=PromptObservation(policy.needs))
    kept = policy.keep(seen).tolist()
    assert kept == [sorted(norms[head].argsort()[:12].tolist()) for head in range(2)]
    assert kept[0] != kept[1], "heads choose for themselves"
    once = L2Compress(keep_ratio=0.2, prune_after=0)
    assert once.keep(CacheView(places, 59, once.token_score(keys))).tolist() == kept


def test_h2o_by_factor_is_no_stride() -> None:
    attention = torch.rand(2, 40, generator=torch.Generator().manual_seed(1))
    policy = get_policy("h2o", factor=5)
    observed = PromptObservation(policy.needs)
    observed.sums = attention
    keys = torch.zeros(2, 40, 8)
    seen = PromptView(torch.arange(40).expand(2, 40), 39, keys=keys, values=keys, observed=observed)
    heavy = [sorted([*sorted(range(36), key=lambda i, r=row: -r[i])[:4], 36, 37, 38, 39]) for row in attention.tolist()]
    assert policy.keep(seen).tolist() == heavy
    stride = UniformStride(factor=5).keep(view(40, heads=None)).tolist()
    assert stride not in policy.keep(seen).tolist()


def test_golden_strides() -> None:
    def indices(length: int, **parameters: Any) -> list[int]:
        found: list[int] = UniformStride(**parameters).keep(view(length, heads=None)).tolist()
        return found

    long = indices(3968, factor=5)
    assert (len(long), long[1], long[-1]) == (793, 5, 3960)
    compat = indices(4000, factor=5, rounding="kvpress_compat")
    assert (len(compat), compat[-1]) == (799, 3990)
    low = indices(3000, factor=1.5)
    assert (len(low), low[-1]) == (2000, 1999), "the first ones, and the most recent are dropped"
    caveat = UniformStride(factor=1.5).caveat(3000)
    assert caveat is not None
    assert "the first 2000 of 3000" in caveat
    assert UniformStride(factor=5).caveat(3968) is None


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"factor": 0.5}, "factor=0.5"),
        ({"factor": 0}, "factor=0"),
        ({"factor": -5}, "factor=-5"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"factor": float("inf")}, "factor=inf"),
        ({"factor": True}, "factor=True"),
        ({"factor": "five"}, "factor=five"),
        ({"factor": 5, "rounding": "up"}, "rounding=up"),
        ({"rounding": "kvpress_compat"}, "give a factor too"),
    ],
)
@pytest.mark.parametrize("name", ["snapkv", "streaming_llm"])
def test_no_such_factor(name: str, parameters: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        get_policy(name, **parameters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("streaming_llm", {"recent_size": 20}),
        ("recent_only", {"window": 20}),
        ("snapkv", {"keep_ratio": 0.2}),
        ("l2_compress", {"prune_after": 20}),
        ("l2_compress", {"mode": "every_token"}),
        ("fix_size_l2", {"size": 20}),
    ],
)
def test_a_factor_beside_a_size_is_refused(name: str, size: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="both say how many tokens stay"):
        get_policy(name, factor=5, **size)


def test_a_factor_larger_than_the_prompt_is_told() -> None:
    assert "one token stays" in str(get_policy("knorm", factor=5).caveat(3))
    assert get_policy("knorm", factor=5).caveat(5) is None
    told = StreamingLLM(start_size=4, factor=5).caveat(15)
    assert told is not None
    assert "no more than the 4 sinks" in told
    assert StreamingLLM(start_size=4, factor=5).keep(view(15, heads=None)).tolist() == [0, 1, 14]


def test_the_protected_part_is_one_of_what_the_factor_keeps() -> None:
    policy = FixSizeL2(keep_ratio=1.0, factor=4)
    assert policy.keep(view(40)).tolist() == [list(range(30, 40))] * 2
    assert "all of the 10 tokens" in str(policy.caveat(40))
