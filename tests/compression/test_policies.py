"""Each policy's own rules and its golden index sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvsuite.compression import (
    REPLACEMENTS,
    CacheView,
    FixSizeL2,
    L2Compress,
    Policy,
    RecentOnly,
    Schedule,
    StreamingLLM,
    get_policy,
    list_policies,
    register_policy,
)
from kvsuite.compression.base import time_order
from kvsuite.errors import UserError

NORMS = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0]


def view(norms: list[float] | int, **facts: Any) -> CacheView:
    """Tokens 0 .. n - 1 in time order, one head; a number stands for that many equal norms."""
    values = [1.0] * norms if isinstance(norms, int) else norms
    given_facts: dict[str, Any] = {"step": len(values), "heads": torch.arange(1)} | facts
    return CacheView(torch.arange(len(values))[None], len(values) - 1, torch.tensor([values]), **given_facts)


def kept(policy: Policy, of: CacheView) -> list[int]:
    indices = policy.keep(of)
    assert indices.dtype == torch.int64
    return [int(i) for i in indices[0]]


def test_golden_streaming() -> None:
    assert kept(StreamingLLM(start_size=4, recent_size=4), view(10)) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert kept(RecentOnly(window=4), view(10)) == [6, 7, 8, 9]
    assert kept(StreamingLLM(start_size=0, recent_size=4), view(10)) == [6, 7, 8, 9]
    assert kept(StreamingLLM(start_size=4, recent_size=4), view(8)) == list(range(8))


def test_golden_fix_size() -> None:
    assert kept(FixSizeL2(size=5, keep_ratio=0.4), view(NORMS)) == [1, 3, 4, 6, 7]
    assert kept(FixSizeL2(size=5, keep_ratio=0.4, strategy="keep_high"), view(NORMS)) == [0, 2, 5, 6, 7]


def test_golden_l2() -> None:
    assert kept(L2Compress(keep_ratio=0.5, prune_after=4), view(NORMS[:7])) == [1, 2, 3, 4]
    assert kept(L2Compress(keep_ratio=0.5, prune_after=7), view(NORMS[:7])) == list(range(7))
    assert kept(L2Compress(keep_ratio=0.5, prune_after=6), view(NORMS[:7])) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("size", "ratio", "protected"),
    [(512, 0.2, 102), (512, 0.3, 153), (512, 0.5, 256), (512, 0.8, 409),
     (256, 0.2, 51), (256, 0.3, 76), (256, 0.5, 128), (256, 0.8, 204),
     # int(100 * 0.29) is 28: the float lies below the decimal
     (100, 0.29, 29), (100, 0.57, 57), (100, 0.0, 0), (100, 1.0, 100)],
)  # fmt: skip
def test_golden_protected(size: int, ratio: float, protected: int) -> None:
    policy = FixSizeL2(size=size, keep_ratio=ratio)
    assert policy.protected_of(policy.size) == protected
    norms = [float(i + 1) for i in range(2 * size)]
    chosen = kept(policy, view(norms))
    # the lowest norms are the oldest tokens here
    assert chosen == [*range(size - protected), *range(2 * size - protected, 2 * size)]


@pytest.mark.parametrize("ratio", [0.07, 0.29, 0.57, 0.58, 1.0])
def test_l2_counts_on_the_decimal(ratio: float) -> None:
    cents = round(ratio * 100)
    for length in range(1, 400):
        expected = -(-length * cents // 100)
        assert L2Compress(keep_ratio=ratio, prune_after=0).size_after(length) == expected


def test_defaults_are_those_of_the_library() -> None:
    assert get_policy("streaming_llm").parameters() == {"start_size": 4, "recent_size": 508}
    assert get_policy("recent_only").parameters() == {"window": 512}
    assert get_policy("l2_compress").parameters() == {"keep_ratio": 1.0, "prune_after": 1000, "mode": "single_shot"}
    assert get_policy("fix_size_l2").parameters() == {"size": 1024, "keep_ratio": 0.0, "strategy": "keep_low"}
    # the MLPs have no default for their weights
    for name in set(list_policies()) - {"mlp", "mlp_residual"}:
        assert get_policy(name).skip_layers == frozenset()
        assert get_policy(name).positions == "original"


def test_registry() -> None:
    assert {"fix_size_l2", "l2_compress", "recent_only", "streaming_llm"} <= set(list_policies())
    with pytest.raises(UserError, match=r"nosuch: unknown policy; known: .*fix_size_l2, .*l2_compress"):
        get_policy("nosuch")
    for name, instead in REPLACEMENTS.items():
        with pytest.raises(UserError) as caught:
            get_policy(name)
        assert instead in str(caught.value)
    assert register_policy(RecentOnly) is RecentOnly

    class Other(RecentOnly):
        pass

    with pytest.raises(ValueError, match="already registered"):
        register_policy(Other)
    assert get_policy("recent_only").__class__ is RecentOnly


@pytest.mark.parametrize(
    ("name", "parameters", "names"),
    [
        ("recent_only", {"window": 0}, "--kv-recent-sizes=0"),
        ("recent_only", {"window": -3}, "--kv-recent-sizes=-3"),
        ("recent_only", {"window": True}, "--kv-recent-sizes=True"),
        ("recent_only", {"window": 2.5}, "--kv-recent-sizes=2.5"),
        ("streaming_llm", {"recent_size": 0}, "--kv-recent-sizes=0"),
        ("streaming_llm", {"start_size": -1}, "--kv-start-size=-1"),
        ("fix_size_l2", {"size": 0}, "--kv-fix-kv-sizes=0"),
        ("fix_size_l2", {"keep_ratio": 1.01}, "--kv-keep-ratios=1.01"),
        ("fix_size_l2", {"keep_ratio": -0.1}, "--kv-keep-ratios=-0.1"),
        ("fix_size_l2", {"keep_ratio": math.nan}, "--kv-keep-ratios=nan"),
        ("fix_size_l2", {"strategy": "keep_all"}, "--kv-strategies=keep_all"),
        ("l2_compress", {"keep_ratio": 0.0}, "--kv-keep-ratios=0"),
        ("l2_compress", {"keep_ratio": 1.5}, "--kv-keep-ratios=1.5"),
        ("l2_compress", {"keep_ratio": math.nan}, "--kv-keep-ratios=nan"),
        ("l2_compress", {"prune_after": -1}, "--kv-prune-after=-1"),
        ("l2_compress", {"mode": "sometimes"}, "--kv-l2-mode=sometimes"),
        ("l2_compress", {"mode": "interval=0"}, "--kv-l2-mode=interval=0"),
        ("l2_compress", {"mode": "interval=-2"}, "--kv-l2-mode=interval=-2"),
        ("recent_only", {"positions": "absolute"}, "--kv-positions=absolute"),
        ("recent_only", {"skip_layers": [-1]}, "--kv-skip-layers=[-1]"),
    ],
)
def test_defect_11_sizes_are_checked(name: str, parameters: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError) as caught:
        get_policy(name, **parameters)
    message = str(caught.value)
    assert message.startswith(names)
    assert "\n" not in message


def test_defect_04_the_schedule_is_named() -> None:
    single, every, some = (Schedule(name) for name in ("single_shot", "every_token", "interval=16"))
    assert [single.due(step=s, done=d) for s, d in ((1, False), (2, False), (3, True))] == [True, True, False]
    assert all(every.due(step=s, done=True) for s in range(1, 40))
    assert [s for s in range(1, 40) if some.due(step=s, done=False)] == [16, 32]
    assert (single.label, every.label, some.label) == ("single_shot", "every_token", "interval16")
    assert L2Compress().parameters()["mode"] == "single_shot"


@pytest.mark.parametrize("seen", [17, 2**20])
def test_random_is_even_over_positions_heads_and_layers(seen: int) -> None:
    """Each of 64 tokens is kept about equally often over many heads, layers and steps: none is favoured by its place."""
    policy = FixSizeL2(size=32, strategy="random", seed=1)
    heads, layers = 50, 40
    counts = torch.zeros(64)
    positions = torch.arange(64).expand(layers, 1, heads, 64)
    chosen = policy.keep(
        CacheView(
            positions,
            63,
            torch.ones(layers, 1, heads, 64),
            layer=torch.arange(layers)[:, None, None],
            heads=torch.arange(heads),
            step=seen,
        )
    )
    counts.scatter_add_(0, chosen.flatten(), torch.ones(chosen.numel()))
    # binomial with n = 2000 and p = 1/2: five standard deviations are 112
    assert (counts - 1000).abs().max() < 112
    # chosen lists of different heads are different choices
    assert len({tuple(row.tolist()) for row in chosen.reshape(-1, 32)}) == heads * layers


def test_random_changes_with_every_part_of_its_seed() -> None:
    def pick(seed: int = 0, **facts: Any) -> list[int]:
        return kept(FixSizeL2(size=16, strategy="random", seed=seed), view(64, **facts))

    first = pick(layer=3, heads=torch.tensor([2]), step=64)
    assert first == pick(layer=3, heads=torch.tensor([2]), step=64)
    others = [
        pick(1, layer=3, heads=torch.tensor([2]), step=64),
        pick(layer=4, heads=torch.tensor([2]), step=64),
        pick(layer=3, heads=torch.tensor([1]), step=64),
        pick(layer=3, heads=torch.tensor([2]), step=65),
    ]
    assert first not in others
    assert len({tuple(other) for other in others}) == 4
    # the largest seed that --kv-seed takes
    assert len({tuple(pick(seed)) for seed in (0, 2**33, 2**64 - 1)}) == 3


def test_a_prompt_that_was_just_stored_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorts of 32,768 positions, one a layer, took the host of an H200 longer than the card took for the prompt."""
    expected = {name: get_policy(name).keep(view(200)) for name in ("streaming_llm", "recent_only")}
    positions = torch.arange(200)
    monkeypatch.setattr(torch.Tensor, "argsort", None)
    for name, kept_ones in expected.items():
        found = get_policy(name).keep(CacheView(positions, 199, step=200, ordered=True))
        assert torch.equal(found, kept_ones.reshape(-1))
    wide = CacheView(positions.expand(2, 3, 200), 199, ordered=True)
    assert torch.equal(time_order(wide), positions.expand(2, 3, 200))
