"""Policies that merge: how many tokens are left, which are untouched, and that every layer has its own weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressor_weights import one_by_one, random_weights, written
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvsuite.compression import get_policy
from kvsuite.compression.merging import CacheShape, Merging
from kvsuite.errors import CaseInvalid, UserError

LENGTHS = {9: 9, 10: 2, 11: 3, 14: 6, 100: 20, 576: 116, 3392: 680, 3968: 796, 4000: 800, 4096: 820}
SHAPE: dict[str, Any] = {
    "model": "tiny", "revision": "sha256:1", "layers": 3, "head_dims": frozenset({16}), "device": torch.device("cpu"),
    "dtype": torch.float32,
}  # fmt: skip


def shape(**other: Any) -> CacheShape:
    return CacheShape(**(SHAPE | other))


def built(name: str, path: Path, **weights: Any) -> Merging:
    parameters = {} if name == "mean_pool" else {"weights": written(path / "weights.pth", **weights)}
    policy = get_policy(name, factor=5, **parameters)
    assert isinstance(policy, Merging)
    policy.prepare(shape())
    return policy


def prompt(tokens: int, layers: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    keys, values = torch.randn(2, layers, 2, tokens, 16, generator=generator)
    return keys, values


@pytest.mark.parametrize(("length", "left"), LENGTHS.items())
def test_lengths_of_the_original(length: int, left: int) -> None:
    assert get_policy("mean_pool", factor=5).size_after(length) == left


def test_an_image_is_counted_apart() -> None:
    policy = get_policy("mean_pool", factor=5)
    assert policy.size_of_prompt(3968, ((0, 576),)) == 116 + 680 == 796
    # text, image, text: 3 + 116 + 4, where one part of 587 tokens would be 119
    assert policy.size_of_prompt(3 + 576 + 12, ((3, 579),)) == 3 + 116 + 4
    # another policy counts tokens, whatever they show
    assert get_policy("snapkv", factor=5).size_of_prompt(3968, ((0, 576),)) == 793


@given(
    pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=4),
    tail=st.integers(1, 30),
    factor=st.integers(1, 7),
)
def test_parts_cover_the_prompt_and_remainders_are_the_same_to_the_bit(
    pieces: list[tuple[int, int]], tail: int, factor: int
) -> None:
    images, at = [], 0
    for text, image in pieces:
        images.append((at + text, at + text + image))
        at += text + image
    length, spans = at + tail, tuple(images)
    policy = get_policy("mean_pool", factor=factor)
    assert isinstance(policy, Merging)
    keys, values = prompt(length, 1)
    merged, _ = policy.merge(keys, values, [0], spans)
    # by hand: every part from its start, whole groups first
    wanted, start = [], 0
    for stop, _is_image in [(stop, i) for span in spans for stop, i in ((span[0], False), (span[1], True))] + [
        (length, False)
    ]:
        own = keys[..., start:stop, :]
        groups = own.shape[2] // factor if factor > 1 and own.shape[2] // factor >= 2 else 0
        wanted += [own[..., g * factor : (g + 1) * factor, :].mean(2, keepdim=True) for g in range(groups)]
        wanted.append(own[..., groups * factor :, :])
        start = stop
    expected = torch.cat(wanted, dim=2)
    assert merged.shape[2] == expected.shape[2] == policy.size_of_prompt(length, spans)
    torch.testing.assert_close(merged, expected)
    if factor == 1:
        assert merged is keys


@pytest.mark.parametrize("name", ["mean_pool", "mlp", "mlp_residual"])
def test_what_is_left_of_a_part_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    policy, (keys, values) = built(name, tmp_path), prompt(34)
    merged = policy.merge(keys, values, range(3), ((0, 13),))
    for made, full in zip(merged, (keys, values), strict=True):
        assert made.shape == (3, 2, 2 + 3 + 4 + 1, 16)
        assert torch.equal(made[..., 2:5, :], full[..., 10:13, :])
        assert torch.equal(made[..., 9:, :], full[..., 33:, :])
        assert not torch.equal(made[..., :2, :], full[..., :2, :])


@pytest.mark.parametrize("name", ["mlp", "mlp_residual"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)])
def test_batched_products_are_those_of_a_plain_loop(name: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    policy, (keys, values) = built(name, tmp_path), prompt(25)
    state = random_weights().state_dict()
    own = list(layers)
    merged = policy.merge(keys[own], values[own], own, ((0, 10),))
    for made, full, families in zip(merged, (keys, values), (("ik", "tk"), ("iv", "tv")), strict=True):
        for at, layer in enumerate(layers):
            parts = []
            for family, tokens in zip(families, (full[layer, :, :10], full[layer, :, 10:]), strict=True):
                pooled = one_by_one(state, family, layer, tokens, 5)
                mean = tokens.unflatten(1, (-1, 5)).mean(2) if name == "mlp_residual" else 0
                parts.append(pooled + mean)
            torch.testing.assert_close(made[at], torch.cat(parts, dim=1))


def test_a_swap_of_two_layers_weights_is_seen(tmp_path: Path) -> None:
    keys, values = prompt(20)
    before = built("mlp", tmp_path).merge(keys, values, range(3))
    swapped = random_weights()
    for linears in swapped.families.values():
        for weight, bias in linears:
            weight[[0, 1]], bias[[0, 1]] = weight[[1, 0]], bias[[1, 0]]
    other = get_policy("mlp", factor=5, weights=written(tmp_path / "swapped.pth", swapped))
    assert isinstance(other, Merging)
    other.prepare(shape())
    after = other.merge(keys, values, range(3))
    for one, two in zip(before, after, strict=True):
        assert [torch.equal(one[layer], two[layer]) for layer in range(3)] == [False, False, True]
    # the layers are named, not counted: layer 1 alone has its own weights
    alone = built("mlp", tmp_path).merge(keys[1:2], values[1:2], [1])
    torch.testing.assert_close(alone[0][0], before[0][1])


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def test_twelve_products_for_all_layers(tmp_path: Path) -> None:
    policy, (keys, values) = built("mlp", tmp_path), prompt(60)
    with Products() as counted:
        policy.merge(keys, values, range(3), ((3, 20), (31, 45)))
    assert counted.count == 12
    with Products() as counted:
        policy.merge(keys, values, range(3))
    assert counted.count == 6


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"factor": 2.5}, r"factor=2.5\): so many tokens become one; give a whole number of at least 1"),
        ({"factor": None}, r"factor=None\): so many tokens become one"),
        ({"factor": 0.5}, r"factor=0.5\): one of so many tokens stays"),
        ({"factor": 5, "rounding": "kvpress_compat"}, r"whole groups are merged; leave rounding out"),
        ({"factor": 5, "positions": "cache"}, r"a merged key has no place of its own; use --kv-positions=original"),
    ],
)
def test_parameters_that_cannot_be(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_policy("mean_pool", **parameters)


def test_short_prompts_say_that_nothing_is_merged() -> None:
    policy = get_policy("mean_pool", factor=5)
    assert policy.caveat(9) == "9 tokens are fewer than 2 groups of 5: nothing is merged"
    assert policy.caveat(10) is None
    assert get_policy("mean_pool", factor=1).caveat(9) is None
    assert policy.caveat_of_prompt(9) == policy.caveat(9)
    # 14 tokens, of which 5 are an image's: neither part has two groups
    assert "no part of the 14 tokens, text or image, has 2 groups of 5" in str(policy.caveat_of_prompt(14, ((0, 5),)))
    assert policy.caveat_of_prompt(15, ((0, 5),)) is None
    assert policy.ratio_requested == 0.8


def test_spans_of_images_that_cannot_be() -> None:
    policy = get_policy("mean_pool", factor=5)
    for spans in (((0, 10), (5, 20)), ((4, 4),), ((10, 31),)):
        with pytest.raises(ValueError, match="image tokens"):
            policy.size_of_prompt(30, spans)


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        (
            {},
            {"layers": 4},
            "weights of another model (not named: 3 layers, heads of 16) than tiny (4 layers, heads of 16)",
        ),
        ({}, {"head_dims": frozenset({32})}, "(3 layers, heads of 32)"),
        ({"model": "big", "revision": "sha256:2"}, {}, "weights of another model (big: 3 layers"),
        ({"factor": 4}, {}, "makes one token of 4, not of 5; use factor 4"),
        (
            {"form": "residual"},
            {},
            "the weights are those of method mlp_residual, not mlp; use --kv-method=mlp_residual",
        ),
        ({}, {"head_dims": frozenset({16, 32})}, "merges heads of one width, and this model has 16 and 32"),
    ],
)
def test_weights_for_something_else_are_one_line(
    made: dict[str, Any], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "weights.pth", **made)
    policy = get_policy("mlp", factor=5, weights=path)
    assert isinstance(policy, Merging)
    with pytest.raises(CaseInvalid) as caught:
        policy.prepare(shape(**asked))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_need_weights_of_their_own(tmp_path: Path) -> None:
    policy, (keys, values) = built("mlp", tmp_path, images=False), prompt(30)
    policy.merge(keys, values, range(3))
    with pytest.raises(CaseInvalid, match=r"holds no weights for image tokens \(compress_ik\)"):
        policy.merge(keys, values, range(3), ((0, 20),))


def test_other_weights_are_another_case(tmp_path: Path) -> None:
    path = written(tmp_path / "weights.pth")
    policy = get_policy("mlp", factor=5, weights=path)
    again = get_policy("mlp", **policy.to_dict())
    assert again.to_dict() == policy.to_dict()
    written(tmp_path / "weights.pth", random_weights(images=False))
    other = get_policy("mlp", factor=5, weights=path)
    assert other.to_dict()["digest"] != policy.to_dict()["digest"]
    with pytest.raises(UserError, match=re.escape(f"--kv-compressor-path={path}: holds other weights")):
        get_policy("mlp", **policy.to_dict())
    # exchanged between collecting and running
    assert isinstance(policy, Merging)
    with pytest.raises(CaseInvalid, match=r"holds other weights .* than when it was asked for"):
        policy.prepare(shape())


def test_without_weights_the_line_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--kv-method=mlp: has no weights; give --kv-compressor-path=FILE, .* fit-compr"
    ):
        get_policy("mlp", factor=5)
    with pytest.raises(UserError, match=r"gone.pth: no such file; check the path"):
        get_policy("mlp", factor=5, weights=str(tmp_path / "gone.pth"))
