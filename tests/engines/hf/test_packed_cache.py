"""Attention reads what is stored: every query sees the same packed and plain tokens, however the text was fed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_decoders import LAYERS, model, text
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.chosen_format import parse_format
from kvsuite.cache_formats.pack import pack, unpack
from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy
from kvsuite.engines.hf.attention import register_observed_attention
from kvsuite.engines.hf.cache import EvictionCache
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.engines.rotary import Rotary

TOKENS = 26
#: a format for each of the layers: two pack groups and have a residual window, the others pack values alone
BY_LAYER = "by_layer(kivi_int4(group=8,residual=5)*2|auto:int8*2)"
FORMATS = [
    "fp8_e4m3", "fp8_e4m3(group=8)", "int8", "int4", "int8:int4", "auto:int4(group=4)", "int4(group=8,residual=7)",
    "int8+hadamard:int4(residual=1)+hadamard", "int4_channel(group=4)", "kivi_int4(group=8,residual=5)",
    "int8:int8_channel(group=8,residual=11)+hadamard", BY_LAYER,
]  # fmt: skip


def chosen_format(name: str) -> OwnFormat:
    found = parse_format(name)
    assert isinstance(found, OwnFormat)
    return found


@functools.cache
def decoder(kind: str = "llama") -> CachedDecoder:
    """In float64, where sums in another order round to the same codes, or in float32: policies that look at norms need it."""
    built = copy.deepcopy(model(kind.removesuffix("-float32")))
    built = built if kind.endswith("-float32") else built.double()
    built.set_attn_implementation(register_observed_attention("sdpa"))
    return CachedDecoder(built, built.config, torch.device("cpu"))


def through(side: Any, vectors: Tensor) -> Tensor:
    return unpack(side, pack(side, vectors), vectors.dtype) if side.is_packed and vectors.shape[-2] else vectors


@contextmanager
def slow_attention(of: CachedDecoder, chosen: OwnFormat) -> Iterator[None]:
    """One query after another over keys and values that are packed up to its boundary, of a text without a cache."""

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        outputs = []
        one = chosen.of_layers(of.layers)[module.layer_idx]
        for at in range(query.shape[2]):
            assert one is not None
            bound = one.boundary(at + 1)
            keys, values = (
                torch.cat((through(side, x[:, :, :bound]), x[:, :, bound : at + 1]), 2)
                for side, x in ((one.keys, key), (one.values, value))
            )
            again = query.shape[1] // key.shape[1]
            keys, values = keys.repeat_interleave(again, 1), values.repeat_interleave(again, 1)
            weights = (query[:, :, at : at + 1] @ keys.mT * scaling).softmax(-1)
            outputs.append(weights @ values)
        return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("slow_packed", attend)
    AttentionMaskInterface.register("slow_packed", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = of.model.config._attn_implementation
    of.model.set_attn_implementation("slow_packed")
    try:
        yield
    finally:
        of.model.set_attn_implementation(before)


def feed(ids: Tensor, chunks: list[int], name: str | None, policy: Policy | None = None, kind: str = "llama") -> Any:
    """Logits after each chunk, by their position, and the cache."""
    of = decoder(kind)
    turns = policy is not None and policy.positions == "cache"
    room = ids.shape[1]
    cache = of.new_cache(
        policy, (room, room), "ring", Rotary(of.model) if turns else None, room,
        None if name is None else chosen_format(name), batch=ids.shape[0],
    )  # fmt: skip
    logits, at = {}, 0
    with torch.inference_mode():
        for chunk in chunks:
            logits[at + chunk - 1] = of.forward(ids[:, at : at + chunk], cache)[:, -1]
            at += chunk
    cache.refuse_vectors()
    return logits, cache


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "llama") for name in FORMATS), ("int4(group=8,residual=7)", "neox"), ("int8:int4", "neox")],
)
def test_every_query_sees_what_the_definition_says_however_the_text_is_fed(name: str, kind: str) -> None:
    chosen, of, ids = chosen_format(name), decoder(kind), text(TOKENS, batch=2)
    with torch.inference_mode(), slow_attention(of, chosen):
        wanted = of.all_logits(ids)
    with torch.inference_mode():
        plain = of.all_logits(ids)
    assert (wanted - plain).abs().max() > 1e-5, "the format changes nothing here, so the test would see no mistake"
    for chunks in ([18] + [1] * 8, [1] * 26, [5, 1, 1, 9, 7, 1, 2]):
        logits, _ = feed(ids, chunks, name, kind=kind)
        for at, found in logits.items():
            torch.testing.assert_close(found, wanted[:, at], rtol=1e-9, atol=1e-9, msg=f"{name} {chunks} at {at}")


POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("streaming_llm", {"start_size": 2, "recent_size": 10}),
    ("streaming_llm", {"start_size": 2, "recent_size": 10, "positions": "cache"}),
    ("fix_size_l2", {"size": 12, "strategy": "keep_low", "keep_ratio": 0.5}),
    ("l2_compress", {"keep_ratio": 0.5, "prune_after": 8, "mode": "every_token"}),
    ("snapkv", {"window": 4, "keep_ratio": 0.5}),
]


@pytest.mark.parametrize("name", ["int8", "int4(group=8,residual=6)+hadamard", "fp8_e4m3", "auto:int4"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one[0] + one[1].get("positions", ""))
def test_a_policy_on_a_packed_cache_is_the_policy_on_rounded_keys_and_values(
    name: str, policy: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it the same policy on a plain cache whose model gives it keys and values that were rounded already."""
    ids, chunks = text(TOKENS), [18] + [1] * 8
    logits, cache = feed(ids, chunks, name, get_policy(policy[0], **policy[1]), "llama-float32")
    assert max(cache.lengths()) < TOKENS
    if "residual" not in name:
        found = _on_rounded(ids, chunks, chosen_format(name), get_policy(policy[0], **policy[1]), monkeypatch)
        for at, row in found.items():
            torch.testing.assert_close(logits[at], row, rtol=1e-5, atol=1e-5)
    plain, _ = feed(ids, chunks, None, get_policy(policy[0], **policy[1]), "llama-float32")
    assert any(not torch.equal(plain[at], logits[at]) for at in plain)


def _on_rounded(
    ids: Tensor, chunks: list[int], chosen: OwnFormat, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> Any:
    from kvsuite.engines.hf.eviction_layer import EvictionLayer

    update = EvictionLayer.update

    def rounding(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, form = self._cache, chosen.of_layers(LAYERS)[self.group.layers[self.index]]
        assert form is not None
        turns = self.group.ranked and self.rotates
        if turns:
            places = cache.incoming_positions[0]
            keys = cache.rotary.rotate(through(form.keys, cache.rotary.unrotate(keys, places)), places)
        else:
            keys = through(form.keys, keys)
        return update(self, keys, through(form.values, values), *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EvictionLayer, "update", rounding)
        return feed(ids, chunks, None, policy, "llama-float32")[0]


def test_the_residual_window_reaches_back_in_the_text_whatever_a_policy_removed() -> None:
    """Of sinks and recent tokens in a window of 4 the three newest beside the query are plain, at every step."""
    _, cache = feed(
        text(TOKENS), [18] + [1] * 8, "int4(residual=4)", get_policy("streaming_llm", start_size=2, recent_size=6)
    )
    _, plain = feed(text(TOKENS), [1] * TOKENS, None)
    layer, all_keys = cache.layers[0], plain.layers[0].keys
    group = layer.group
    with torch.inference_mode():
        group.settle()
    kept = group.positions(0, group.length)
    stored = layer.keys
    for slot, position in enumerate(kept.tolist()):
        same = torch.allclose(stored[:, :, slot], all_keys[:, :, position], atol=1e-12)
        assert same == (position >= TOKENS - 4), position


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("policy", [None, POLICIES[0], POLICIES[2], POLICIES[4]], ids=str)
def test_stored_bytes_are_the_predicted_ones(name: str, policy: tuple[str, dict[str, Any]] | None) -> None:
    kind = "llama" if policy is None else "llama-float32"
    chosen, of = chosen_format(name), decoder(kind)
    if policy and chosen.token_group > 1:
        pytest.skip("groups of tokens are not torn")
    for prompt, steps in ((18, 8), (3, 1), (1, 4)):
        built = None if policy is None else get_policy(policy[0], **policy[1])
        ids = text(prompt + steps)
        _, cache = feed(ids, [prompt] + [1] * steps, name, built, kind)
        allocated, headroom = cache.kv_bytes()
        assert allocated - headroom == of.cache_bytes(cache.lengths(), prompt + steps, chosen), (prompt, steps)


def test_auto_stores_the_models_own_numbers_to_the_bit() -> None:
    ids = text(TOKENS)
    logits, cache = feed(ids, [18] + [1] * 8, None)
    assert all(tensor.dtype == torch.float64 for layer in cache.layers for tensor in layer.tensors())
    assert cache.forms == []
    assert isinstance(cache, EvictionCache)
    assert len(logits) == 9


def test_what_is_not_finite_is_refused_and_not_rounded() -> None:
    from kvsuite.errors import CaseInvalid

    of = decoder()
    cache = of.new_cache(None, (8, 8), "ring", None, 8, chosen_format("int8"))
    cache.begin(4)
    bad = torch.ones(1, 2, 4, 16, dtype=torch.float64)
    bad[0, 1, 2, 3] = torch.nan
    cache.layers[0].update(bad, torch.ones_like(bad))
    with pytest.raises(CaseInvalid, match="--kv-cache-dtype=int8: a key or a value is not finite"):
        cache.refuse_vectors()
