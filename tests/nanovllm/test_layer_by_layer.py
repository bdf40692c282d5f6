"""Prompts that are merged some layers after each further token: the logits of doing the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from compressor_weights import random_weights, written
from decoders import fed, fresh, greedy, loaded, prompts
from forced_output import forced_logits
from hand_aside import HandAside
from serving import assert_nothing_lost
from torch import Tensor
from transformers import DynamicCache

from kvsuite.compression import get_policy
from kvsuite.compression.base import ImageSpans, Policy
from kvsuite.compression.merging import Merging
from kvsuite.engines.hf.applicable import prepare_merging
from kvsuite.engines.hf.decoder import CachedDecoder
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.nanovllm.controller import ControllerSettings
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.stage_streams import Work
from kvsuite.nanovllm.steering import Controller

LENGTHS = (38, 12, 40, 37, 11, 2)
OUTPUT = 9
LAYERS = 3
IMAGES: tuple[ImageSpans, ...] = (((0, 16),), (), ((4, 20), (25, 33)), ((1, 13),), (), ())
TEXTS = prompts([length + OUTPUT for length in LENGTHS])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("weights") / "weights.pth", random_weights(factor=3))


def mlp(weights: str) -> Policy:
    return get_policy("mlp", factor=3, weights=weights)


@torch.no_grad()
def by_hand(policy: Policy, tokens: Sequence[int], after: int, images: ImageSpans = ()) -> Tensor:
    """Logits ``[output, vocab]`` of plain transformers, whose prompt is merged behind ``after`` tokens that follow it."""
    of, length = loaded("llama"), len(tokens) - OUTPUT
    assert isinstance(policy, Merging)
    prepare_merging(policy, of, CachedDecoder(of.model, of.text_config, of.device).of_layers, range(LAYERS))
    cache = DynamicCache()
    logits = [of.model(input_ids=torch.tensor([tokens[:length]]), past_key_values=cache).logits[0, -1]]
    for at in range(length, len(tokens) - 1):
        if at == length + after:
            full, cache = cache, DynamicCache()
            for layer, held in enumerate(full.layers):
                made = policy.merge(held.keys[None, :, :, :length], held.values[None, :, :, :length], [layer], images)
                cache.update(
                    torch.cat([made[0][0], held.keys[:, :, length:]], dim=2),
                    torch.cat([made[1][0], held.values[:, :, length:]], dim=2),
                    layer,
                )
        logits.append(fed(of, tokens[at], at, cache))
    return torch.stack(logits)


def made(policy: Policy | None, **how: Any) -> Runtime:
    given = {name: how.pop(name) for name in ("stage", "lanes", "layers_per_step", "controller") if name in how}
    small = {
        "max_model_len": 64, "max_num_seqs": 6, "max_num_batched_tokens": 40, "num_blocks": 24, "block_size": 4,
        "prefix_caching": True,
    }  # fmt: skip
    return Runtime(loaded("llama"), Limits(**small | how), policy=policy, overlap=False, eos_token_ids=(), **given)


def served(
    policy: Policy, *, images: Sequence[ImageSpans] = ((),) * len(LENGTHS), **how: Any
) -> tuple[list[Tensor], Runtime]:
    forced = {name: how.pop(name) for name in ("aside", "preempt_at") if name in how}
    runtime = made(policy, **how)

    def show(index: int, request: Request) -> None:
        request.image_spans = images[index]

    found = forced_logits(runtime, TEXTS, OUTPUT, change=show, **forced)
    assert_nothing_lost(runtime)
    return found, runtime


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("layers", "after"), [(1, 3), (2, 2), (8, 1)])
def test_pages_hold_what_is_merged_by_hand_some_tokens_behind_the_prompt(layers: int, after: int, weights: str) -> None:
    policy = mlp(weights)
    wanted = [by_hand(policy, tokens, after, spans) for tokens, spans in zip(TEXTS, IMAGES, strict=True)]
    found, runtime = served(policy, images=IMAGES, layers_per_step=layers)
    assert_alike(found, wanted)
    assert isinstance(policy, Merging)
    assert runtime.counters.evicted_tokens == sum(
        length - policy.size_of_prompt(length, spans) for length, spans in zip(LENGTHS, IMAGES, strict=True)
    )
    # beside the steps, as late as can be; again after preemption, in the midst of it and behind it; on two lanes
    late = HandAside()
    assert_alike(served(policy, images=IMAGES, layers_per_step=layers, stage="async", aside=late)[0], wanted)
    again, preempted = served(
        policy, images=IMAGES, layers_per_step=layers, preempt_at=(5, 8, 11), admission="optimistic"
    )
    assert preempted.counters.preemptions >= 3
    assert_alike(again, wanted)
    late = HandAside()
    both, runtime = served(policy, images=IMAGES, layers_per_step=layers, stage="async", lanes=2, aside=late)
    assert_alike(both, wanted)
    assert late.fences


def test_steps_wait_for_what_was_made_and_not_while_it_is_made(weights: str) -> None:
    """Flaw 14 of the original: its decode pipeline read compressed tensors without waiting for the stream that made them."""
    policy = mlp(weights)
    wanted = [by_hand(policy, tokens, LAYERS) for tokens in TEXTS[:1]]
    aside = HandAside()
    runtime = made(policy, stage="async", layers_per_step=1)
    undone = []

    def note(index: int, request: Request) -> None:
        step = runtime.step

        def stepped() -> list[Request]:
            ended = step()
            undone.append(len(aside.queue))
            return ended

        runtime.step = stepped  # type: ignore[method-assign]

    assert_alike(forced_logits(runtime, TEXTS[:1], OUTPUT, aside=aside, change=note), wanted)
    # one layer after each of three tokens, and the exchange with the third; the fourth comes behind all of it
    assert undone[:5] == [0, 1, 2, 4, 0]
    assert aside.waits == 0
    forgotten = HandAside(follows=False)
    runtime = made(policy, stage="async", layers_per_step=1)
    found = forced_logits(runtime, TEXTS[:1], OUTPUT, aside=forgotten)
    assert not torch.allclose(found[0][LAYERS + 1 :], wanted[0][LAYERS + 1 :], atol=1e-2)


def test_blocks_that_are_still_read_are_nobody_elses(weights: str) -> None:
    aside = HandAside()
    runtime = made(mlp(weights), stage="async", layers_per_step=1)
    try:
        runtime.compression._aside = aside
        request = runtime.add(greedy(TEXTS[0][:-OUTPUT], OUTPUT))
        for _ in range(2):
            runtime.step()
        free = runtime.tables[0].pool.free
        runtime.cancel(request)
        assert runtime.tables[0].pool.free == free
        aside.do_all()
        assert runtime.tables[0].pool.free == runtime.num_blocks
    finally:
        runtime.close()


def test_a_prompt_on_its_own_lane_waits_for_blocks_that_are_still_read(weights: str) -> None:
    for lanes in (1, 2):
        runtime = made(mlp(weights), stage="async", lanes=lanes, layers_per_step=1, num_blocks=14)
        try:
            runtime.compression._aside = HandAside()
            first = runtime.add(greedy(TEXTS[0][:-OUTPUT], OUTPUT))
            while first.output_length < 2:
                runtime.step()
            runtime.cancel(first)
            assert runtime.tables[0].pool.held > 0
            second = runtime.run([greedy(TEXTS[2][:-OUTPUT], OUTPUT)])[0]
            assert (second.reason, second.output_length) == ("length", OUTPUT)
        finally:
            runtime.close()
        assert_nothing_lost(runtime)


def test_a_request_that_is_over_before_is_never_merged(weights: str) -> None:
    runtime = made(mlp(weights), layers_per_step=1)
    try:
        requests = runtime.run([greedy(TEXTS[0][:-OUTPUT], length) for length in (1, 2, LAYERS, LAYERS + 1)])
        assert runtime.counters.evicted_tokens == 38 - (12 + 2)
        assert [request.stored for request in requests] == [[38], [39], [40], [14 + LAYERS]]
    finally:
        runtime.close()


def test_a_fork_in_the_midst_of_it_goes_on_with_what_is_there(weights: str) -> None:
    policy = mlp(weights)
    for late in (None, HandAside()):
        runtime = made(policy, layers_per_step=1, stage="sync" if late is None else "async")
        try:
            if late is not None:
                runtime.compression._aside = late
            request = runtime.add(greedy(TEXTS[0][:-OUTPUT], OUTPUT))
            for _ in range(3):
                runtime.step()
            child = runtime.fork(request)
            with pytest.raises(UserError, match="its prompt is being merged until 3 tokens behind it are fed"):
                runtime.compress(child, torch.arange(4))
            while runtime.unfinished:
                runtime.step()
            assert child.output == request.output
            assert child.stored == request.stored
        finally:
            runtime.close()
        assert_nothing_lost(runtime)


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_is_reserved_is_enough_until_it_is_merged_and_behind_it(lanes: int, weights: str) -> None:
    lengths, output = (38, 30, 41, 25, 36, 33, 22, 40), 14
    wanted: list[list[int]] | None = None
    for blocks in (14, 17, 24, 80):
        runtime = made(mlp(weights), layers_per_step=1, lanes=lanes, num_blocks=blocks, prefix_caching=False)
        try:
            requests = runtime.run([greedy(prompt, output) for prompt in prompts(lengths)])
            assert {request.reason for request in requests} == {"length"}
            assert runtime.counters.preemptions == 0
            wanted = wanted or [request.output for request in requests]
            assert [request.output for request in requests] == wanted
        finally:
            runtime.close()


def test_what_was_decided_for_a_prompt_holds_when_it_is_computed_again(weights: str) -> None:
    policy, prompt = mlp(weights), TEXTS[0][:-OUTPUT]
    for first, then in ((1, None), (None, 1), (2, 1)):
        runtime = made(policy, layers_per_step=first, num_blocks=64)
        wanted = runtime.run([greedy(prompt, OUTPUT)])[0].output
        runtime.close()
        runtime = made(policy, layers_per_step=first, num_blocks=64)
        try:
            request = runtime.add(greedy(prompt, OUTPUT))
            for _ in range(3):
                runtime.step()
            child = runtime.fork(request)
            runtime.compression.layers_per_step = then
            runtime.scheduler.preempt_for(greedy([1], 1))
            runtime.scheduler.preempt_for(greedy([1], 1))
            while runtime.unfinished:
                runtime.step()
            assert request.preemptions == child.preemptions == 1
            assert request.output == child.output == wanted
        finally:
            runtime.close()


def test_what_cannot_go_layer_by_layer_is_refused(weights: str) -> None:
    with pytest.raises(CaseInvalid, match="layers_per_step=4: policy streaming_llm keeps tokens"):
        made(get_policy("streaming_llm", factor=2), layers_per_step=4)
    with pytest.raises(CaseInvalid, match="layers_per_step=4: there is no policy"):
        made(None, layers_per_step=4)
    with pytest.raises(UserError, match="layers_per_step=0: at least 1"):
        made(mlp(weights), layers_per_step=0)


def steered(weights: str, controller: Controller, *, lanes: int = 1, new: int = 12) -> tuple[list[list[int]], Runtime]:
    limits = Limits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256, num_blocks=96, block_size=8)
    how: dict[str, Any] = {"policy": mlp(weights), "stage": "async", "controller": controller, "lanes": lanes}
    runtime = Runtime(fresh("llama"), limits, **how, eos_token_ids=(), overlap=False)
    try:
        requests = runtime.run([greedy(prompt, new) for prompt in prompts((48, 40, 56, 33, 64, 50, 37, 61) * 2)])
        assert {request.reason for request in requests} == {"length"}
    finally:
        runtime.close()
    assert_nothing_lost(runtime)
    return [request.output for request in requests], runtime


def asked(weights: str, **how: Any) -> ControllerSettings:
    return ControllerSettings(
        method="mlp", factor=3, layers=LAYERS, kv_heads=2, head_dim=16, weight_bytes=1, token_bytes=768, bandwidth=1e9,
        greenctx=False, min_seq_len=32, min_output_len=8, layers_per_step=2, force=True, **how,
    )  # fmt: skip


def clock(step: float) -> Callable[[], float]:
    ticks = count()
    return lambda: next(ticks) * step


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_controller_chooses_the_decode_pipeline_for_an_mlp_and_its_run_can_be_replayed(
    lanes: int, weights: str
) -> None:
    controller = Controller(asked(weights), now=clock(0.1))
    outputs, runtime = steered(weights, controller, lanes=lanes)
    log = [entry for entry in controller.log if "decision" in entry]
    # by rule 2 fewer than four prompts in a step are merged at their end
    assert {entry["decision"]["pipeline"] for entry in log} == {"decode", "prefill"}
    for entry in log:
        layers = entry["decision"]["decode_layers_per_step"] if entry["decision"]["pipeline"] == "decode" else None
        assert entry["applied"]["layers_per_step"] == layers
    assert runtime.counters.evicted_tokens > 0
    assert log[-1]["inputs"]["compress_samples"] > 0
    again = Controller(asked(weights), replay=controller.log, now=clock(7.0))
    assert steered(weights, again, lanes=lanes)[0] == outputs


def test_on_two_lanes_no_later_decision_takes_merging_to_the_stream_of_the_decode_steps(weights: str) -> None:
    # four prompts in a step go layer by layer, the one behind them is alone
    controller = Controller(replace(asked(weights), interval=1, layers_per_step=1), now=clock(0.1))
    limits = Limits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256, num_blocks=96, block_size=8)
    how: dict[str, Any] = {"policy": mlp(weights), "stage": "async", "controller": controller, "lanes": 2}
    runtime = Runtime(fresh("llama"), limits, **how, eos_token_ids=(), overlap=False)
    runtime.compression._aside = aside = HandAside()
    by_decoding: list[Request] = []

    def note(request: Request, work: Work) -> Work:
        by_decoding.extend([request] * request.handed_over)
        return work

    runtime.compression.measured = note
    try:
        for prompt in prompts((40, 40, 40, 40)):
            runtime.add(greedy(prompt, 12))
        for _ in range(2):
            runtime.step()
        # what was begun is measured, and nothing pending: by rule 5 one prompt is then compressed with the steps
        aside.do_all()
        runtime.run([greedy(prompt, 12) for prompt in prompts((40,))])
    finally:
        runtime.close()
    log = [entry for entry in controller.log if "decision" in entry]
    assert [entry["decision"]["pipeline"] for entry in log] == ["decode", "prefill"]
    assert [entry["decision"]["async_compress"] for entry in log] == [True, False]
    assert {entry["applied"]["async_compress"] for entry in log} == {True}
    assert len(by_decoding) == len(aside.fences) == 4 * (LAYERS + 1)


def test_layers_of_a_decision_are_those_that_a_runtime_without_a_controller_takes(weights: str) -> None:
    # a step and what hides in it take as long: the number of layers stays
    found, _ = steered(weights, Controller(replace(asked(weights), interval=1000), now=clock(0.1)))
    limits = Limits(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256, num_blocks=96, block_size=8)
    runtime = Runtime(fresh("llama"), limits, policy=mlp(weights), layers_per_step=2, eos_token_ids=())
    try:
        requests = runtime.run([greedy(prompt, 12) for prompt in prompts((48, 40, 56, 33, 64, 50, 37, 61) * 2)])
        assert [request.output for request in requests] == found
    finally:
        runtime.close()
