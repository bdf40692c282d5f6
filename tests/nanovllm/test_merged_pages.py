"""Policies that merge on paged blocks and on hf's slots: the logits of merging a prompt's keys and values by hand."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressor_weights import random_weights, written
from decoders import fed, greedy, loaded, prompts, text
from forced_output import forced_logits
from hand_aside import HandAside
from image_prompts import MIXED
from serving import assert_nothing_lost, serving
from torch import Tensor
from transformers import DynamicCache

from kvsuite.cache_formats.chosen_format import parse_format
from kvsuite.compression import get_policy
from kvsuite.compression.base import ImageSpans, Policy
from kvsuite.compression.merging import Merging
from kvsuite.engines.hf.applicable import prepare_merging
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.reservation import Reservation, largest_after_prompt
from kvsuite.nanovllm.runtime import Runtime

LENGTHS = (38, 12, 40, 37, 11)
OUTPUT = 9
#: of each prompt where images stand
IMAGES: tuple[ImageSpans, ...] = (((0, 16),), (), ((4, 20), (25, 33)), ((1, 13),), ())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("weights") / "weights.pth", random_weights(factor=3))


def built(name: str, weights: str, factor: int = 3, **common: Any) -> Policy:
    return get_policy(name, factor=factor, **({} if name == "mean_pool" else {"weights": weights}), **common)


@functools.cache
def asked() -> list[list[int]]:
    return prompts([length + OUTPUT for length in LENGTHS])


@torch.no_grad()
def by_hand(policy: Policy, tokens: Sequence[int], images: ImageSpans = ()) -> Tensor:
    """Logits ``[output, vocab]`` of plain transformers on merged keys and values."""
    of, length = loaded("llama"), len(tokens) - OUTPUT
    assert isinstance(policy, Merging)
    prepare_merging(policy, of, CachedDecoder(of.model, of.text_config, of.device).of_layers, range(3))
    full, cache = DynamicCache(), DynamicCache()
    logits = [of.model(input_ids=torch.tensor([tokens[:length]]), past_key_values=full).logits[0, -1]]
    for layer, held in enumerate(full.layers):
        made = held.keys[None], held.values[None]
        if layer not in policy.skip_layers:
            made = policy.merge(*made, [layer], images)
        cache.update(made[0][0], made[1][0], layer)
    if not policy.skip_layers:
        assert cache.get_seq_length() == policy.size_of_prompt(length, images)
    logits += [fed(of, tokens[at], at, cache) for at in range(length, len(tokens) - 1)]
    return torch.stack(logits)


def served(
    policy: Policy | None,
    *,
    stage: Any = "sync",
    aside: HandAside | None = None,
    images: Sequence[ImageSpans] = ((),) * len(LENGTHS),
    preempt_at: Sequence[int] = (),
    **limits: Any,
) -> tuple[list[Tensor], Runtime]:
    small = {
        "max_model_len": 64, "max_num_seqs": 5, "max_num_batched_tokens": 40, "num_blocks": 16, "block_size": 4,
        "prefix_caching": True,
    }  # fmt: skip
    runtime = Runtime(loaded("llama"), Limits(**(small | limits)), policy=policy, stage=stage, overlap=False)

    def show(index: int, request: Request) -> None:
        request.image_spans = images[index]

    found = forced_logits(runtime, asked(), OUTPUT, aside=aside, preempt_at=preempt_at, change=show)
    assert_nothing_lost(runtime)
    return found, runtime


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("images", [((),) * 5, IMAGES], ids=["text", "images"])
@pytest.mark.parametrize("name", ["mean_pool", "mlp", "mlp_residual"])
def test_pages_hold_what_is_merged_by_hand(name: str, images: Sequence[ImageSpans], weights: str) -> None:
    policy = built(name, weights)
    wanted = [by_hand(policy, tokens, spans) for tokens, spans in zip(asked(), images, strict=True)]
    found, runtime = served(policy, images=images)
    assert_alike(found, wanted)
    assert runtime.counters.evicted_tokens == sum(
        length - policy.size_of_prompt(length, spans) for length, spans in zip(LENGTHS, images, strict=True)
    )
    # beside the steps, as late as can be; and again after preemption
    late = HandAside()
    assert_alike(served(policy, stage="async", aside=late, images=images)[0], wanted)
    assert len(late.fences) >= len(LENGTHS)
    again, preempted = served(policy, images=images, preempt_at=(3, 7), admission="optimistic")
    assert preempted.counters.preemptions >= 2
    assert_alike(again, wanted)


def test_where_images_stand_changes_what_is_merged(weights: str) -> None:
    policy = built("mlp", weights)
    text_only, images = by_hand(policy, asked()[0]), by_hand(policy, asked()[0], IMAGES[0])
    assert not torch.allclose(text_only[1:], images[1:], atol=1e-2)
    # flaw 13 of the original: a text was treated as if its first tokens were an image's
    assert_alike([served(policy, images=[IMAGES[0], (), (), (), ()])[0][1]], [by_hand(policy, asked()[1])])


@torch.no_grad()
def on_hf(policy: Policy, tokens: Sequence[int], images: ImageSpans, implementation: Any) -> Tensor:
    of, length = loaded("llama"), len(tokens) - OUTPUT
    decoder = CachedDecoder(of.model, of.text_config, of.device)
    cache = decoder.new_cache(policy, (64, 64), implementation, None)
    decoder.set_attention("sdpa")
    cache.set_images(images)
    logits = [decoder.forward(torch.tensor([list(tokens[:length])]), cache)[0, -1]]
    logits += [decoder.forward(torch.tensor([[tokens[at]]]), cache)[0, -1] for at in range(length, len(tokens) - 1)]
    treated = next(group for group in cache.groups if group.policy is not None)
    assert treated.length == policy.size_of_prompt(length, images) + OUTPUT - 1
    return torch.stack(logits)


@pytest.mark.parametrize("implementation", ["ring", "copy"])
@pytest.mark.parametrize("skip", [(), (1,)])
def test_slots_hold_what_is_merged_by_hand(skip: tuple[int, ...], implementation: str, weights: str) -> None:
    policy = built("mlp_residual", weights, skip_layers=skip)
    for tokens, images in zip(asked()[:3], IMAGES, strict=False):
        wanted = by_hand(policy, tokens, images)
        torch.testing.assert_close(on_hf(policy, tokens, images, implementation), wanted, atol=1e-4, rtol=1e-4)


def test_pages_of_layers_that_are_skipped_keep_everything(weights: str) -> None:
    policy = built("mlp", weights, skip_layers=(1,))
    assert_alike(served(policy)[0], [by_hand(policy, tokens) for tokens in asked()])


def test_a_factor_of_one_is_no_compression(weights: str) -> None:
    dense, _ = served(None)
    found, runtime = served(built("mean_pool", weights, factor=1))
    assert runtime.counters.evicted_tokens == 0
    for own, other in zip(found, dense, strict=True):
        assert torch.equal(own, other)


def test_a_request_reserves_what_its_images_leave() -> None:
    policy = built("mean_pool", "", factor=5)
    # of 34 tokens 6 + 4 are left, and with an image of 13 in front 2 + 3 and 4 + 1
    assert largest_after_prompt(policy, 34, 40) == 10 + 6
    assert largest_after_prompt(policy, 34, 40, ((0, 13),)) == 10 + 6
    assert largest_after_prompt(policy, 34, 40, ((0, 9),)) == 9 + 5 + 6
    limits = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=32, block_size=4)
    runtime = Runtime(loaded("llama"), limits, policy=policy)
    request = greedy(text(34), 7)
    request.image_spans, request.longest, request.prefill = ((0, 9),), 41, 34
    begins, _, _, _, most = Reservation(runtime.tables[0], 64, policy)._of(request)
    runtime.close()
    assert (begins, most) == (14, 5)


def test_a_policy_goes_with_what_reserved_for_it() -> None:
    policy = built("mean_pool", "", factor=5)
    with serving(loaded("llama"), policy=policy) as runtime:
        runtime.run([greedy(text(34), 2)])
    gone = weakref.ref(policy)
    del policy, runtime
    gc.collect()
    assert gone() is None, "a learned compressor's weights would stay on the device"


def test_packed_pages_are_refused(weights: str) -> None:
    policy = built("mlp", weights)
    limits = Limits(
        max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=32, block_size=4,
        cache_format=parse_format("int8"),
    )  # fmt: skip
    with pytest.raises(
        CaseInvalid, match=r"--kv-cache-dtype=int8: policy mlp merges tokens, .* use --kv-cache-dtype=auto"
    ):
        Runtime(loaded("llama"), limits, policy=policy)


def test_weights_of_another_model_end_the_case(tmp_path: Path) -> None:
    policy = built("mlp", written(tmp_path / "other.pth", random_weights(layers=4, factor=3)))
    with pytest.raises(CaseInvalid, match="weights of another model"):
        served(policy)


def test_images_without_weights_of_their_own_are_refused_before_anything_is_served(tmp_path: Path) -> None:
    policy = built("mlp", written(tmp_path / "text.pth", random_weights(factor=2, images=False)), factor=2)
    with serving(loaded("llava"), policy=policy, block_size=4) as runtime:
        requests = [runtime.add(greedy(tokens, 2, images=images)) for tokens, images in MIXED[:2]]
        assert [request.status for request in requests] == [Status.FAILED, Status.WAITING]
        assert "holds no weights for image tokens (compress_ik)" in str(requests[0].reason)
        runtime.run()
    assert len(requests[1].output) == 2


def test_the_images_of_a_request_are_found_by_its_own_tokens() -> None:
    """Flaw 13 of the original: how many tokens are an image's was taken from the model, for texts as well."""
    of, policy = loaded("llava"), get_policy("mean_pool", factor=2)
    assert isinstance(policy, Merging)
    spans = [((0, 4),), (), ((3, 7), (16, 20)), ((17, 21),), (), ((0, 4), (4, 8))]
    merged: list[ImageSpans] = []
    merge = policy.merge

    def spied(keys: Tensor, values: Tensor, layers: Sequence[int], images: ImageSpans = ()) -> tuple[Tensor, Tensor]:
        merged.append(images)
        return merge(keys, values, layers, images)

    policy.merge = spied  # type: ignore[method-assign]
    with serving(of, policy=policy, block_size=4, prefix_caching=False) as runtime:
        requests = runtime.run([greedy(tokens, 6, images=images) for tokens, images in MIXED])
        assert [request.image_spans for request in requests] == spans
        assert runtime.counters.evicted_tokens == sum(
            len(tokens) - policy.size_of_prompt(len(tokens), own) for (tokens, _), own in zip(MIXED, spans, strict=True)
        )
    assert sorted(merged) == sorted(spans)
    # hf finds the same, and gives the same tokens
    decoder = CachedDecoder(of.model, of.text_config, of.device)
    for request, (tokens, images) in zip(requests[:3], MIXED, strict=False):
        cache = decoder.new_cache(policy, (64, 64), "ring", None)
        pixels = torch.from_numpy(np.stack([one.pixels for one in images])) if images else None
        with torch.no_grad():
            found = [int(decoder.forward(torch.tensor([tokens]), cache, pixels)[0, -1].argmax())]
            while len(found) < 6:
                found.append(int(decoder.forward(torch.tensor([found[-1:]]), cache)[0, -1].argmax()))
        assert found == request.output
