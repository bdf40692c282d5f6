"""Requests with images among requests of text: the tokens of `generate`, whatever is cut, shared or preempted."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from decoders import generated, greedy, loaded, text
from image_prompts import IMAGE, MIXED, SIZE, TOKENS, image, prompt
from serving import serving

from kvsuite.compression import get_policy
from kvsuite.models.image_reader import ImageReader
from kvsuite.models.images import ImagePixels
from kvsuite.nanovllm.cuda_runner import cuda_runner
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime


def expected(tokens: Sequence[int], images: Sequence[ImagePixels], new_tokens: int) -> list[int]:
    if not images:
        return generated(loaded("llava"), tokens, new_tokens)
    pixels = torch.from_numpy(np.stack([one.pixels for one in images]))
    return generated(loaded("llava"), tokens, new_tokens, pixel_values=pixels)


@functools.cache
def mixed_outputs() -> list[list[int]]:
    return [expected(*one, 12) for one in MIXED]


@pytest.mark.parametrize(
    ("step", "blocks", "policy"), [(64, 64, None), (3, 13, None), (7, 13, "factor 1"), (1, 24, None)]
)
def test_images_and_text_together_give_the_tokens_of_generate(step: int, blocks: int, policy: str | None) -> None:
    """Steps of 3 tokens and of 1 cut images; a small pool preempts."""
    wanted = mixed_outputs()
    # features matter: with others the first prompt goes on in another way
    assert wanted[0] != expected(MIXED[0][0], [image(9)], 12)
    keeps_all = None if policy is None else get_policy("streaming_llm", factor=1)
    options: dict[str, Any] = {"max_num_batched_tokens": step, "num_blocks": blocks, "block_size": 4}
    with serving(loaded("llava"), policy=keeps_all, max_num_seqs=min(6, step), **options) as runtime:
        requests = runtime.run([greedy(tokens, 12, images=images) for tokens, images in MIXED])
        assert (runtime.counters.preemptions > 0) == (blocks == 13)
    assert [request.output for request in requests] == wanted
    assert all(request.features is None for request in requests), "what is over holds no memory"


def test_two_lanes_give_the_same() -> None:
    limits = Limits(max_model_len=64, max_num_seqs=6, max_num_batched_tokens=8, num_blocks=64, block_size=4)
    runtime = Runtime(loaded("llava"), limits, lanes=2, prompt_layers=1)
    try:
        requests = runtime.run([greedy(tokens, 12, images=images) for tokens, images in MIXED])
    finally:
        runtime.close()
    assert [request.output for request in requests] == mixed_outputs()


def test_a_preempted_request_keeps_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, images = prompt(image(1), 6, image(2), 5)
    read: list[bytes] = []
    features = ImageReader.features

    def counted(self: ImageReader, one: ImagePixels) -> Any:
        read.append(one.digest)
        return features(self, one)

    monkeypatch.setattr(ImageReader, "features", counted)
    with serving(loaded("llava"), block_size=4, prefix_caching=False) as runtime:
        request = runtime.add(greedy(tokens, 8, images=images))
        for _ in range(3):
            runtime.step()
        runtime.scheduler.preempt_for(Request([1]))
        assert request.status is Status.PREEMPTED
        runtime.run()
        assert request.fed > len(tokens) + 8, "the prompt was computed again"
    assert request.output == expected(tokens, images, 8)
    assert read == [images[0].digest, images[1].digest]


def test_the_prefix_cache_tells_images_apart() -> None:
    """The same tokens with another image, in another order, and at the end of a prefix that is shared."""
    one, other = image(1), image(2)
    # the second image begins in the block that the first one ends in
    given = [
        prompt(2, one, other, 20),
        prompt(2, one, other, 20),
        prompt(2, one, one, 20),
        prompt(2, other, one, 20),
        prompt(2, ImagePixels(one.pixels.copy()), other, 20),
    ]
    assert len({tuple(tokens) for tokens, _ in given}) == 1
    with serving(loaded("llava"), block_size=4) as runtime:
        found = [runtime.run([greedy(tokens, 8, images=images)])[0] for tokens, images in given]
    assert [request.output for request in found] == [expected(*each, 8) for each in given]
    # 30 tokens: blocks of [t t 1 1] [1 1 2 2] [2 2 t t] and four of text, the last of which has the token to compute
    assert [request.prefix_hits for request in found] == [0, 28, 4, 0, 28]


def test_a_last_token_of_an_image_alone_takes_no_captured_step() -> None:
    """A step of one token that is an image's looks like a decode step, whose graph embeds tokens and nothing else."""
    tokens, images = prompt(5, image(1))
    limits = Limits(
        max_model_len=64, max_num_seqs=1, max_num_batched_tokens=len(tokens) - 1, num_blocks=16, block_size=4
    )
    runtime = Runtime(loaded("llava"), limits, runner=cuda_runner(sizes=[1]))
    try:
        [request] = runtime.run([greedy(tokens, 8, images=images)])
        assert runtime.counters.decode_steps == 8, "seven tokens of output, and the image's last"
    finally:
        runtime.close()
    assert request.output == expected(tokens, images, 8)


def test_pixels_are_the_images_own() -> None:
    given = np.zeros((3, SIZE, SIZE), dtype=np.float32)
    given.flags.writeable = False
    frozen = ImagePixels(given)
    tokens = [IMAGE] * TOKENS + text(5)
    with serving(loaded("llava")) as runtime:
        # torch warns of memory that it may not write to, and warnings are errors here
        [request] = runtime.run([greedy(tokens, 4, images=[frozen])])
    assert request.output == expected(tokens, [ImagePixels(np.zeros((3, SIZE, SIZE)))], 4)
    given.flags.writeable = True
    digest = ImagePixels(given).digest
    given += 1
    assert ImagePixels(given).digest != digest == frozen.digest


def test_a_text_is_never_taken_for_an_image() -> None:
    """The original took every prompt on LLaVA for 576 image tokens and text: the image's length is the request's own."""
    tokens, _ = prompt(12)
    mixed = prompt(2, image(1), image(2), 5, image(3), 3)
    with serving(loaded("llava")) as runtime:
        text_alone = runtime.add(greedy(tokens, 4))
        with_image = runtime.add(greedy([IMAGE] * TOKENS + tokens, 4, images=[image(1)]))
        several = runtime.add(greedy(*mixed[:1], 4, images=mixed[1]))
        runtime.run()
    assert (len(text_alone.image_places), len(with_image.image_places)) == (0, TOKENS)
    assert (text_alone.image_spans, with_image.image_spans) == ((), ((0, TOKENS),))
    assert several.image_spans == ((2, 6), (6, 10), (15, 19))
    assert text_alone.output == expected(tokens, [], 4)


@pytest.mark.parametrize(
    ("kind", "tokens", "images", "reason"),
    [
        ("llava", [IMAGE] * TOKENS + [5], [], "has image tokens .4 times token 255. and no image"),
        (
            "llava",
            [IMAGE] * TOKENS + [5],
            [image(1), image(2)],
            "2 image.s. of 4 tokens each, and the prompt has 4 image",
        ),
        ("llava", [5, 6], [image(1)], "1 image.s. of 4 tokens each, and the prompt has 0 image"),
        (
            "llava",
            [IMAGE] * TOKENS,
            [ImagePixels(np.zeros((3, 6, SIZE)))],
            "image of 8 x 6 pixels, and the model reads 8 x 8; resize it",
        ),
        ("llama", [5, 6], [image(1)], "llama has no vision tower"),
    ],
)
def test_what_does_not_belong_together_fails_alone(
    kind: str, tokens: list[int], images: list[ImagePixels], reason: str
) -> None:
    beside = text(9)
    with serving(loaded(kind)) as runtime:
        bad, good = runtime.run([greedy(tokens, 4, images=images), greedy(beside, 4)])
    assert bad.status is Status.FAILED
    assert re.search(reason, bad.reason or ""), bad.reason
    assert good.output == generated(loaded(kind), beside, 4)


def test_a_fork_goes_on_with_its_images() -> None:
    tokens, images = prompt(image(1), 9)
    with serving(loaded("llava"), block_size=4) as runtime:
        request = runtime.add(greedy(tokens, 8, images=images))
        for _ in range(3):
            runtime.step()
        child = runtime.fork(request)
        # its blocks are gone: it computes its prompt anew
        runtime.scheduler.preempt_for(request)
        runtime.run()
    assert child.output == request.output == expected(tokens, images, 8)


def test_scored_tokens_behind_an_image() -> None:
    tokens, images = prompt(image(1), 9)
    seen: list[torch.Tensor] = []
    with serving(loaded("llava"), prefix_caching=False) as runtime:
        runtime.on_rows = lambda rows, states: seen.append(runtime.runner.logits(states).clone())
        runtime.run([Request(tokens, scored=5, images=images)])
        # a text that is scored is a text, though it has the token of images
        [text_alone] = runtime.run([Request([IMAGE, 5, 6], scored=1)])
    assert text_alone.status is Status.FINISHED
    with torch.inference_mode():
        whole = loaded("llava").model(
            input_ids=torch.tensor([tokens]), pixel_values=torch.from_numpy(images[0].pixels)[None], use_cache=False
        )
    torch.testing.assert_close(seen[0], whole.logits[0, -5:], atol=2e-5, rtol=1e-4)
