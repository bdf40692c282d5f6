"""Prompts beside decoding: the tokens of one lane, whatever the order in which both get on."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoders import generated, greedy, loaded, prompts, text
from hand_fence import HandFence
from serving import LogitsByRequest, assert_nothing_lost

from kvsuite.compression import get_policy
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm import prompt_lane
from kvsuite.nanovllm.cuda_runner import cuda_runner
from kvsuite.nanovllm.in_flight import TokensInFlight
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.prompt_lane import LaneStep
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

MIXED = (1, 40, 7, 16, 33, 57)
NEW = 14
SMALL = {"max_model_len": 84, "max_num_seqs": 5, "max_num_batched_tokens": 24, "num_blocks": 40, "block_size": 4}


@contextmanager
def _lanes(
    of: LoadedModel, *, layers: int | None = 1, options: dict[str, Any] | None = None, **limits: Any
) -> Iterator[Runtime]:
    runtime = Runtime(of, Limits(**(SMALL | limits)), lanes=2, prompt_layers=layers, **(options or {}))
    try:
        yield runtime
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


def _interleave(runtime: Runtime, seed: int) -> None:
    """Let the prompt lane get on in a random rhythm: some steps it does nothing, in others several turns."""
    lane, rhythm = runtime._prompts, random.Random(seed)
    assert lane is not None
    advance = lane.advance

    def sometimes() -> Any:
        if rhythm.random() < 0.4:
            return None
        for _ in range(rhythm.randrange(3)):
            lane.turn()
        return advance()

    lane.advance = sometimes  # type: ignore[method-assign]


@functools.cache
def _plain(kind: str, new: int = NEW) -> list[list[int]]:
    return [generated(loaded(kind), prompt, new) for prompt in prompts(MIXED)]


@pytest.mark.parametrize(
    ("kind", "blocks", "layers", "overlap", "preempted"),
    [
        ("llama", 40, 1, False, False),
        ("llama", 22, 1, True, True),
        ("mistral-window", 22, 1, True, False),
        ("qwen3", 22, None, True, True),
        ("llama", 22, 2, False, True),
    ],
)
def test_output_equals_generate(kind: str, blocks: int, layers: int | None, overlap: bool, preempted: bool) -> None:
    admission = "optimistic" if preempted else "reserve"
    with _lanes(
        loaded(kind), layers=layers, num_blocks=blocks, admission=admission, options={"overlap": overlap}
    ) as runtime:
        steps: list[LaneStep] = []
        runtime.on_lane_step = steps.append
        if layers is not None:
            _interleave(runtime, blocks + overlap)
        requests = runtime.run([greedy(prompt, NEW) for prompt in prompts(MIXED)])
        assert (runtime.counters.preemptions > 0) == preempted
        assert runtime.counters.logical_output_tokens == NEW * len(requests)
    assert [request.output for request in requests] == _plain(kind)
    assert all(request.status is Status.FINISHED and len(request.times) == NEW for request in requests)
    fed = {
        lane: sum(s.prompt_tokens + s.decode_tokens for s in steps if s.lane == lane) for lane in ("prompt", "decode")
    }
    assert fed["prompt"] >= sum(MIXED)
    assert fed["decode"] + fed["prompt"] == sum(request.fed for request in requests)


def test_decoding_goes_on_while_a_prompt_is_launched() -> None:
    of = loaded("llama")
    with _lanes(of, options={"overlap": False}) as runtime:
        first = runtime.add(greedy(text(5), 20))
        while not first.output:
            runtime.step()
        second = runtime.add(greedy(text(20, seed=1), 4))
        runtime.step()
        before = len(first.output)
        while not second.output:
            runtime.step()
        assert len(first.output) > before
        assert not second.handed_over or second.output
        runtime.run()
    assert first.output == generated(of, text(5), 20)
    assert second.output == generated(of, text(20, seed=1), 4)


def test_blocks_of_a_prompt_that_is_cancelled_while_it_is_launched_go_to_nobody_before_its_end() -> None:
    of = loaded("llama")
    limits = {"num_blocks": 12, "prefix_caching": False, "admission": "optimistic"}
    with _lanes(of, options={"overlap": False}, **limits) as runtime:
        [table] = runtime.tables
        lane = runtime._prompts
        assert lane is not None
        first = runtime.add(greedy(text(9), 30))
        while not first.output:
            runtime.step()
        second = runtime.add(greedy(text(18, seed=1), 4))
        runtime.step()
        blocks, under_way = set(table.row_blocks(second.row)), lane._step
        assert blocks
        assert under_way is not None
        assert not under_way.launched
        runtime.cancel(second)
        # the rest of its layers has yet to write its blocks, and the lane gets on only where somebody waits for it
        advance, lane.advance = lane.advance, lambda: None  # type: ignore[method-assign]
        while True:
            runtime.step()
            if under_way.fence.passed():
                break
            assert not blocks & set(table.row_blocks(first.row))
        assert blocks & set(table.row_blocks(first.row)), "nobody wanted them"
        lane.advance = advance  # type: ignore[method-assign]
        runtime.run()
    assert first.output == generated(of, text(9), 30)
    assert second.output == []


@functools.cache
def _alone(prompt: tuple[int, ...]) -> list[int]:
    return generated(loaded("llama"), prompt, NEW)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("caching", [False, True])
def test_prefixes_preemption_cancelling_and_random_rhythms(seed: int, caching: bool) -> None:
    of = loaded("llama")
    chance = random.Random(seed)
    shared = text(24, seed=9)
    given = [shared[: 4 * (i % 5) + 7] + text(2 * i + 1, seed=i % 3) for i in range(7)]
    plain = [_alone(tuple(prompt)) for prompt in given]
    with _lanes(
        of, num_blocks=24, prefix_caching=caching, admission="optimistic", options={"overlap": bool(seed % 2)}
    ) as runtime:
        _interleave(runtime, seed)
        requests = [runtime.add(greedy(prompt, NEW)) for prompt in given]
        while runtime.unfinished:
            runtime.step()
            if chance.random() < 0.05:
                runtime.cancel(chance.choice(requests))
    assert any(request.status is Status.FINISHED for request in requests)
    for request, row in zip(requests, plain, strict=True):
        assert request.output == row[: len(request.output)]
        assert request.status is Status.CANCELLED or len(request.output) == NEW


@pytest.mark.parametrize(("name", "factor"), [("streaming_llm", 3), ("snapkv", 3), ("knorm", 1)])
def test_compressed_prompts_give_the_tokens_of_one_lane(name: str, factor: int) -> None:
    of = loaded("llama")
    given = prompts(MIXED)
    found = []
    for lanes in (1, 2):
        runtime = Runtime(
            of,
            Limits(**SMALL | {"num_blocks": 30, "prefix_caching": False, "max_num_batched_tokens": 64}),
            policy=get_policy(name, factor=factor),
            lanes=lanes,
            prompt_layers=1,
        )
        if lanes == 2:
            _interleave(runtime, factor)
        requests = runtime.run([greedy(prompt, NEW) for prompt in given])
        found.append([request.output for request in requests])
        assert factor == 1 or runtime.counters.evicted_tokens > 0
        runtime.close()
        assert_nothing_lost(runtime)
    assert found[0] == found[1]
    assert factor > 1 or found[0] == _plain("llama")


def test_nothing_is_handed_over_or_reused_before_the_device_has_compressed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding that does not wait for the compression reads what is still being moved (flaws 5 and 14 of the original)."""
    of = loaded("llama")
    policy = get_policy("streaming_llm", factor=3)
    limits = Limits(**SMALL | {"num_blocks": 30})
    alone = Runtime(of, limits, policy=policy)
    expected = [request.output for request in alone.run([greedy(text(9), 40), greedy(text(20, seed=1), 4)])]
    alone.close()
    fences: list[HandFence] = []

    def made(device: torch.device) -> HandFence:
        fences.append(HandFence())
        return fences[-1]

    with _lanes(of, num_blocks=30, options={"overlap": False, "policy": policy}) as runtime:
        [table] = runtime.tables
        first = runtime.add(greedy(text(9), 40))
        while not first.output:
            runtime.step()
        monkeypatch.setattr(prompt_lane, "fence_now", made)
        second = runtime.add(greedy(text(20, seed=1), 4))
        runtime.step()
        blocks, computed = set(table.row_blocks(second.row)), len(first.output)
        for _ in range(12):
            runtime.step()
            given_back = blocks - set(table.row_blocks(second.row))
            assert not second.output
            assert not second.handed_over
            assert not given_back & set(table.row_blocks(first.row))
        assert second.compressed
        assert given_back
        assert table.pool.held == len(given_back)
        assert len(first.output) == computed + 12
        for fence in fences:
            fence.let_pass()
        runtime.step()
        assert second.handed_over
        assert table.pool.free + table.pool.used == 30
        monkeypatch.undo()
        runtime.run()
    assert [first.output, second.output] == expected


def test_sampled_and_forced_requests_and_static_steps() -> None:
    of = loaded("qwen3")
    given = prompts((9, 30, 14, 25, 7))
    found = []
    for lanes in (1, 2):
        runtime = Runtime(
            of, Limits(**SMALL), lanes=lanes, prompt_layers=1, overlap=True, runner=cuda_runner(sizes=[2, 5, 8])
        )
        logits = LogitsByRequest(runtime)
        requests = [
            Request(prompt, SamplingParameters(max_new_tokens=20, temperature=0.8 * (i % 2), seed=i, ignore_eos=True))
            for i, prompt in enumerate(given)
        ]
        requests[2].forced = text(20, seed=77)
        runtime.run(requests)
        runtime.close()
        assert_nothing_lost(runtime)
        found.append([request.output for request in requests])
        assert all(len(logits.of(request)) == 20 for request in requests)
    assert found[0] == found[1]


def test_an_error_of_one_lane_costs_its_own_requests() -> None:
    of = loaded("llama")
    with _lanes(of) as runtime:
        first = runtime.add(greedy(text(9), 20))
        while not first.output:
            runtime.step()
        lane = runtime._prompts
        assert lane is not None
        compute = lane._launcher.compute

        def breaks(*given: Any) -> Any:
            compute(*given)
            raise RuntimeError("broken")

        lane._launcher.compute = breaks  # type: ignore[method-assign]
        second = runtime.add(greedy(text(11, seed=1), 4))
        with pytest.raises(RuntimeError, match="broken"):
            runtime.run()
        assert second.status is Status.FAILED
        lane._launcher.compute = compute  # type: ignore[method-assign]
        third = runtime.add(greedy(text(7, seed=2), 4))
        runtime.run()
    assert first.output == generated(of, text(9), 20)
    assert third.output == generated(of, text(7, seed=2), 4)


def test_prompts_are_launched_while_the_host_would_wait_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    of = loaded("llama")
    with _lanes(of, options={"overlap": True}) as runtime:
        first = runtime.add(greedy(text(9), 30))
        while len(first.output) < 3:
            runtime.step()
        lane = runtime._prompts
        assert lane is not None
        # a device that is never ready before the whole prompt is launched
        monkeypatch.setattr(TokensInFlight, "arrived", property(lambda flight: False))
        second = runtime.add(greedy(text(11, seed=1), 4))
        runtime.step()
        assert not lane.launching
        assert lane._step is not None
        compute = lane._launcher.compute
        while not second.output:
            runtime.step()

        def breaks(*given: Any) -> Any:
            raise RuntimeError("broken")

        lane._launcher.compute = breaks  # type: ignore[method-assign]
        third = runtime.add(greedy(text(7, seed=2), 4))
        runtime.step()
        assert not third.status.over
        with pytest.raises(RuntimeError, match="broken"):
            runtime.step()
        assert third.status is Status.FAILED
        lane._launcher.compute = compute  # type: ignore[method-assign]
        runtime.run()
    assert first.output == generated(of, text(9), 30)
    assert second.output == generated(of, text(11, seed=1), 4)


def test_fork_and_compress_settle_both_lanes() -> None:
    of = loaded("llama")
    with _lanes(of) as runtime:
        first = runtime.add(greedy(text(13), 12))
        while len(first.output) < 3:
            runtime.step()
        second = runtime.add(greedy(text(20, seed=1), 4))
        runtime.step()
        child = runtime.fork(first)
        assert second.output
        runtime.compress(second, torch.arange(0, 20, 2))
        runtime.run()
    assert child.output == first.output == generated(of, text(13), 12)
    assert second.output[:1] == generated(of, text(20, seed=1), 1)


def test_closing_ends_a_prompt_that_is_being_launched() -> None:
    with _lanes(loaded("llama")) as runtime:
        request = runtime.add(greedy(text(20), 4))
        lane = runtime._prompts
        assert lane is not None
        lane.advance()
        assert lane.launching
    assert request.status is Status.CANCELLED
    assert not lane.launching


def test_what_two_lanes_cannot_do_is_refused() -> None:
    of = loaded("llama")
    with pytest.raises(UserError, match="lanes=3"):
        Runtime(of, Limits(**SMALL), lanes=3)
    with pytest.raises(UserError, match="partition"):
        Runtime(of, Limits(**SMALL), partition=object())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompt_layers=0"):
        Runtime(of, Limits(**SMALL), lanes=2, prompt_layers=0)
    with pytest.raises(CaseInvalid, match="factor"):
        Runtime(of, Limits(**SMALL), lanes=2, policy=get_policy("streaming_llm", start_size=3, recent_size=9))
