"""Steps that are launched before the tokens of the one before were seen give the same tokens, and lose nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoders import KINDS, generated, greedy, loaded, prompts, text
from serving import LogitsByRequest, assert_nothing_lost

from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy
from kvsuite.errors import UserError
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.cuda_runner import cuda_runner
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

MIXED = (1, 40, 7, 16, 33, 3, 57, 15, 17, 21)


@contextmanager
def _overlapping(
    of: LoadedModel, overlap: bool = True, policy: Policy | None = None, **limits: Any
) -> Iterator[Runtime]:
    small = {"max_model_len": 84, "max_num_seqs": 8, "max_num_batched_tokens": 24, "num_blocks": 32, "block_size": 4}
    runtime = Runtime(of, Limits(**(small | limits), admission="optimistic"), policy=policy, overlap=overlap)
    try:
        yield runtime
    finally:
        runtime.close()
        assert_nothing_lost(runtime)


@pytest.mark.parametrize("prefill_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_equals_generate(kind: str, prefill_first: bool) -> None:
    of = loaded(kind)
    given = prompts(MIXED)
    blocks = 20 if kind == "mistral-window" else 32
    with _overlapping(of, num_blocks=blocks, prefill_first=prefill_first) as runtime:
        requests = runtime.run([greedy(prompt, 24) for prompt in given])
        assert runtime.counters.preemptions > 0
        assert runtime.counters.logical_output_tokens == 24 * len(given)
        # who ends by length is known to do so before its last token is
        assert runtime.counters.discarded_tokens == 0
    assert [request.output for request in requests] == [generated(of, prompt, 24) for prompt in given]
    assert all(request.status is Status.FINISHED and request.reason == "length" for request in requests)
    assert all(len(request.times) == 24 for request in requests)


def test_a_step_is_launched_before_tokens_are_delivered() -> None:
    of = loaded("llama")
    seen: list[int] = []
    with _overlapping(of) as runtime:
        request = greedy(text(9), 4, on_token=lambda r, token, at: seen.append(token))
        runtime.add(request)
        delivered = []
        while runtime.unfinished:
            ended = runtime.step()
            delivered.append(len(seen))
            assert request.output == seen
        assert delivered == [0, 1, 2, 3, 4]
        assert ended == [request]
    assert seen == generated(of, text(9), 4)


def test_a_stop_token_is_seen_one_step_late_and_nothing_of_it_shows() -> None:
    of = loaded("llama")
    given = prompts((9, 14, 5))
    plain = [generated(of, prompt, 20) for prompt in given]
    stop = plain[0][6]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in plain]
    with _overlapping(of) as runtime:
        logits = LogitsByRequest(runtime)
        sampling = SamplingParameters(max_new_tokens=20, stop_token_ids=(stop,), ignore_eos=True)
        requests = runtime.run([Request(prompt, sampling) for prompt in given])
        assert [request.output for request in requests] == cut
        assert [request.reason for request in requests] == ["stop" if stop in row else "length" for row in plain]
        assert runtime.counters.discarded_tokens == sum(stop in row[:-1] for row in plain) > 0
        assert [len(logits.of(request)) for request in requests] == [len(row) for row in cut]


@pytest.mark.parametrize("blocks", [24, 64])
def test_sampled_and_forced_requests_side_by_side(blocks: int) -> None:
    of = loaded("qwen3")
    given = prompts((9, 30, 14, 25, 7))
    found = []
    for overlap in (False, True):
        with _overlapping(of, overlap=overlap, num_blocks=blocks) as runtime:
            requests = [
                Request(
                    prompt, SamplingParameters(max_new_tokens=20, temperature=0.8 * (i % 2), seed=i, ignore_eos=True)
                )
                for i, prompt in enumerate(given)
            ]
            requests[2].forced = text(20, seed=77)
            runtime.run(requests)
            assert requests[2].output == text(20, seed=77)
            assert blocks == 64 or runtime.counters.preemptions > 0
            found.append([request.output for request in requests])
    assert found[0] == found[1]


def test_callbacks_may_cancel_and_raise() -> None:
    of = loaded("llama")
    given = prompts((9, 14, 5, 21))
    plain = [generated(of, prompt, 12) for prompt in given]
    with _overlapping(of) as runtime:

        def on_token(request: Request, token: int, at: float) -> None:
            if request is requests[0] and request.output_length == 3:
                runtime.cancel(requests[1])
            if request is requests[2] and request.output_length == 5:
                raise ValueError("enough")

        requests = [greedy(prompt, 12, on_token=on_token) for prompt in given]
        runtime.run(requests)
    statuses = [request.status for request in requests]
    assert statuses == [Status.FINISHED, Status.CANCELLED, Status.FAILED, Status.FINISHED]
    for request, row, count in zip(requests, plain, (12, 2, 5, 12), strict=True):
        assert request.output == request.tokens[request.prompt_length :] == row[: len(request.output)]
        assert len(request.output) in (count, count + 1)
        assert len(request.times) == len(request.output)


def test_cancelling_between_steps_drops_the_token_under_way() -> None:
    of = loaded("llama")
    expected, others = generated(of, text(9), 12), generated(of, text(11, seed=1), 12)
    with _overlapping(of) as runtime:
        request, other = greedy(text(9), 12), greedy(text(11, seed=1), 12)
        runtime.add(request)
        runtime.add(other)
        for _ in range(4):
            runtime.step()
        assert request.in_flight
        assert request.tokens[-1] < 0
        runtime.cancel(request)
        assert request.tokens == text(9) + expected[:3]
        runtime.run()
    assert other.output == others


def test_fork_and_compress_settle_first() -> None:
    of = loaded("llama")
    prompt = text(13)
    expected = generated(of, prompt, 12)
    with _overlapping(of) as runtime:
        request = runtime.add(greedy(prompt, 12))
        for _ in range(4):
            runtime.step()
        child = runtime.fork(request)
        assert not request.in_flight
        assert child.tokens == request.tokens == prompt + expected[:4]
        runtime.run()
        assert child.output == request.output == expected
        last = runtime.add(greedy(prompt, 2))
        runtime.step()
        runtime.step()
        assert last.in_flight
        with pytest.raises(UserError, match="finished"):
            runtime.fork(last)
        # ended between two steps: the next one says so
        assert last.status is Status.FINISHED
        assert runtime.step() == [last]


def test_compressing_by_hand_gives_what_it_gives_without_overlap() -> None:
    of = loaded("llama")
    found = []
    for overlap in (False, True):
        with _overlapping(of, overlap=overlap) as runtime:
            request = runtime.add(greedy(text(13), 12))
            # four output tokens; the last of them is not computed yet
            for _ in range(4):
                runtime.step()
            runtime.compress(request, torch.arange(0, 16, 2))
            assert len(request.tokens) == 17
            assert not request.in_flight
            runtime.run()
            found.append(request.output)
    assert found[0] == found[1]


def test_a_step_that_raises_fails_its_requests_and_no_other() -> None:
    of = loaded("llama")
    with _overlapping(of, max_num_seqs=2) as runtime:
        requests = [runtime.add(greedy(text(5, seed), 8)) for seed in range(3)]
        for _ in range(3):
            runtime.step()
        run = runtime.runner.run

        def breaks(batch: Any) -> Any:
            raise RuntimeError("broken")

        runtime.runner.run = breaks  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="broken"):
            runtime.step()
        runtime.runner.run = run  # type: ignore[method-assign]
        assert [request.status for request in requests] == [Status.FAILED, Status.FAILED, Status.WAITING]
        runtime.run()
    assert requests[2].output == generated(of, requests[2].prompt, 8)
    assert all(not request.in_flight and min(request.tokens) >= 0 for request in requests)


def test_a_prefix_computed_ahead_is_found_again() -> None:
    of = loaded("llama")
    shared = text(18)
    whole = generated(of, shared, 14)
    with _overlapping(of) as runtime:
        runtime.run([greedy(shared, 10)])
        [second] = runtime.run([greedy(shared + whole[:10], 4)])
        assert second.prefix_hits == 24
        assert second.output == whole[10:]


def _alone(of: LoadedModel, prompt: list[int]) -> list[int]:
    """What a request gets under `mean_pool` with nobody beside it and no step ahead."""
    with _overlapping(
        of, overlap=False, policy=get_policy("mean_pool", factor=3), max_num_batched_tokens=64
    ) as runtime:
        return list(runtime.run([greedy(prompt, 6)])[0].output)


def test_the_last_token_of_a_prompt_found_again_is_fed_and_not_the_one_under_way() -> None:
    """A resumed request may be fed one token of its prompt while its next token is still under way."""
    of = loaded("llama")
    prompt = text(25)
    policy = get_policy("mean_pool", factor=3)
    with _overlapping(of, policy=policy, prefix_caching=True, max_num_batched_tokens=64) as runtime:
        request = runtime.add(greedy(prompt, 6))
        for _ in range(3):
            runtime.step()
        assert request.in_flight
        assert runtime.scheduler.preempt_for(greedy([1], 1))
        runtime.step()
        # all of the prompt but its last token was found
        assert runtime.counters.resumed_hit_tokens == len(prompt) - 1
        assert request.computed == len(prompt)
        runtime.run()
    assert request.output == _alone(of, prompt)


def test_a_request_that_another_ones_compression_preempted_comes_back_with_its_token_under_way() -> None:
    of = loaded("llama")
    shared = text(36)
    # blocks: 9 shared; 4, 3 and 1 of their own
    given = [shared + prompts((13,))[0], [token + 1 for token in text(9)], [*shared, 5]]
    policy = get_policy("mean_pool", factor=3)
    limits = {"num_blocks": 17, "prefix_caching": True, "max_num_batched_tokens": 64}
    with _overlapping(of, policy=policy, **limits) as runtime:
        runtime.run([greedy([*shared, 6], 1)])
        requests = [runtime.add(greedy(prompt, 6)) for prompt in given]
        runtime.step()
        # five blocks for the first, whose own are four; compressing the second one makes room for the last again
        assert [request.preemptions for request in requests] == [0, 0, 1]
        assert requests[2].in_flight
        runtime.step()
        assert runtime.counters.resumed_hit_tokens == len(shared)
        assert requests[2].computed == len(given[2])
        runtime.run()
    assert [request.output for request in requests] == [_alone(of, prompt) for prompt in given]


def test_static_steps_and_overlap_together() -> None:
    of = loaded("llama")
    given = prompts(MIXED)
    runtime = Runtime(
        of,
        Limits(
            max_model_len=84,
            max_num_seqs=8,
            max_num_batched_tokens=24,
            num_blocks=32,
            block_size=4,
            admission="optimistic",
        ),
        runner=cuda_runner(sizes=[2, 5, 8]),
        overlap=True,
    )
    requests = runtime.run([greedy(prompt, 24) for prompt in given])
    runtime.close()
    assert_nothing_lost(runtime)
    assert [request.output for request in requests] == [generated(of, prompt, 24) for prompt in given]
