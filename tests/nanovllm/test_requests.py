"""A request's life: stop conditions, streaming, cancellation, and bad ones that harm nobody else."""

from __future__ import annotations

import time

import pytest
import torch
from decoders import VOCAB, generated, greedy, loaded, prompts, text
from serving import assert_nothing_lost, serving

from kvsuite.errors import UserError
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.sampling import SamplingParameters


def test_a_stop_token_ends_the_output_and_is_its_last() -> None:
    of = loaded("llama")
    prompt = text(11)
    whole = generated(of, prompt, 20)
    stop = whole[7]
    end = whole.index(stop) + 1
    with serving(of) as runtime:
        chosen = SamplingParameters(max_new_tokens=20, stop_token_ids=(stop, VOCAB - 1), ignore_eos=True)
        [request] = runtime.run([Request(prompt, chosen)])
    assert request.output == whole[:end]
    assert (request.status, request.reason) == (Status.FINISHED, "stop")


def test_end_of_text_is_the_models_own_unless_ignored() -> None:
    of = loaded("llama")
    prompt = text(11)
    whole = generated(of, prompt, 20)
    eos = whole[5]
    before = of.model.generation_config.eos_token_id
    of.model.generation_config.eos_token_id = [eos, 2]
    try:
        with serving(of) as runtime:
            stopped, ignored = runtime.run(
                [Request(prompt, SamplingParameters(max_new_tokens=20, ignore_eos=flag)) for flag in (False, True)]
            )
    finally:
        of.model.generation_config.eos_token_id = before
    assert stopped.output == whole[: whole.index(eos) + 1]
    assert stopped.reason == "stop"
    assert ignored.output == whole
    assert ignored.reason == "length"


def test_output_ends_with_the_longest_sequence() -> None:
    with serving(loaded("llama"), max_model_len=20) as runtime:
        [request] = runtime.run([greedy(text(15), 99)])
    assert request.output_length == 5
    assert request.reason == "length"


def test_every_token_is_streamed_with_its_time() -> None:
    of = loaded("llama")
    seen: list[tuple[Request, int, float]] = []
    started = time.perf_counter()
    with serving(of) as runtime:
        requests = runtime.run([greedy(p, 6, on_token=lambda *event: seen.append(event)) for p in prompts((5, 9))])
    for request in requests:
        mine = [event for event in seen if event[0] is request]
        assert [token for _, token, _ in mine] == request.output == generated(of, request.prompt, 6)
        times = [at for _, _, at in mine]
        assert times == request.times
        assert started < times[0]
        assert times == sorted(times)
        assert times[-1] < time.perf_counter()


def test_counters() -> None:
    with serving(loaded("llama"), block_size=4, max_num_batched_tokens=8) as runtime:
        runtime.run([greedy(text(20), 5)])
        assert runtime.counters.to_dict() | {"steps": 0} == {
            "steps": 0, "decode_steps": 4, "logical_prompt_tokens": 20, "logical_output_tokens": 5,
            "computed_prefill_tokens": 20, "computed_decode_tokens": 4, "prefix_hit_tokens": 0,
            "resumed_hit_tokens": 0, "preemptions": 0, "discarded_tokens": 0, "evicted_tokens": 0,
        }  # fmt: skip
        runtime.run([greedy(text(20), 5)])
        assert runtime.counters.logical_prompt_tokens == 40
        assert runtime.counters.computed_prefill_tokens == 20 + 4
        assert runtime.counters.prefix_hit_tokens == 16


@pytest.mark.parametrize("when", ["waiting", "prompt", "decoding", "over"])
def test_a_cancelled_request_gives_its_blocks_back(when: str) -> None:
    of = loaded("llama")
    with serving(of, max_num_batched_tokens=16, max_num_seqs=2, block_size=4) as runtime:
        other, request = runtime.add(greedy(text(9), 12)), runtime.add(greedy(text(40, seed=1), 6))
        for _ in range({"waiting": 0, "prompt": 1, "decoding": 6, "over": 30}[when]):
            runtime.step()
        assert request.status is {"waiting": Status.WAITING, "over": Status.FINISHED}.get(when, Status.RUNNING)
        assert (request.output_length > 0) == (when in ("decoding", "over"))
        runtime.cancel(request)
        runtime.cancel(request)
        assert request.status is (Status.FINISHED if when == "over" else Status.CANCELLED)
        runtime.run()
        assert_nothing_lost(runtime)
    assert other.output == generated(of, other.prompt, 12)


def test_callbacks_may_cancel_themselves_and_others() -> None:
    of = loaded("llama")
    with serving(of) as runtime:
        requests: list[Request] = []

        def cancel_all_but_the_last(request: Request, token: int, at: float) -> None:
            if request.output_length == 3:
                for other in requests[:-1]:
                    runtime.cancel(other)

        requests += [greedy(prompt, 8, on_token=cancel_all_but_the_last) for prompt in prompts((9, 9, 9))]
        runtime.run(requests)
    assert [request.status for request in requests] == [Status.CANCELLED, Status.CANCELLED, Status.FINISHED]
    assert [request.output_length for request in requests] == [3, 2, 8]
    assert requests[-1].output == generated(of, requests[-1].prompt, 8)


def test_a_callback_that_raises_costs_its_own_request() -> None:
    of = loaded("llama")

    def broken(request: Request, token: int, at: float) -> None:
        if request.output_length == 2:
            raise OSError("pipe closed")

    with serving(of) as runtime:
        bad, good = runtime.run([greedy(text(9), 8, on_token=broken), greedy(text(9, seed=1), 8)])
    assert (bad.status, bad.reason) == (Status.FAILED, "its callback raised OSError: pipe closed")
    assert isinstance(bad.error, OSError)
    assert bad.output_length == 2
    assert good.output == generated(of, good.prompt, 8)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (text(64), "64 tokens leaves no room for output in max_model_len=64"),
        (text(45), "needs 12 blocks, the pool has 11"),
        ([], "the prompt is empty"),
        ([5, VOCAB], f"token {VOCAB} is not in the vocabulary"),
        ([-1], "token -1 is not in the vocabulary"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(prompt: list[int], reason: str) -> None:
    of = loaded("llama")
    with serving(of, max_model_len=64, num_blocks=11, block_size=4) as runtime:
        bad, good = runtime.run([greedy(prompt, 8), greedy(text(9), 8)])
    assert bad.status is Status.FAILED
    assert reason in str(bad.reason)
    assert good.output == generated(of, good.prompt, 8)


def test_a_request_that_outgrows_the_pool_fails_alone() -> None:
    of = loaded("llama")
    with serving(of, num_blocks=6, block_size=4) as runtime:
        first, greedy_one, last = runtime.run([greedy(text(9), 8), greedy(text(20, seed=1), 30), greedy(text(5), 8)])
    assert greedy_one.status is Status.FAILED
    assert "do not fit the pool of 6 blocks" in str(greedy_one.reason)
    # 24 tokens are stored, and the 25th is known
    assert len(greedy_one.tokens) == 25
    for request in (first, last):
        assert request.output == generated(of, request.prompt, 8)


def test_requests_of_one_name_do_not_mix() -> None:
    with serving(loaded("llama")) as runtime:
        first = runtime.add(greedy(text(5), 4, id="same"))
        second = runtime.add(greedy(text(6), 4, id="same"))
        assert "another request named same" in str(second.reason)
        with pytest.raises(UserError, match="added before"):
            runtime.add(first)
        runtime.run()
        assert first.output_length == 4
        assert runtime.run([greedy(text(6), 4, id="same")])[0].status is Status.FINISHED


def test_a_step_that_fails_costs_its_own_requests() -> None:
    of = loaded("llama")
    with serving(of, max_num_seqs=1) as runtime:
        first, second = runtime.add(greedy(text(9), 6)), runtime.add(greedy(text(7), 6))
        runtime.step()

        def fail(requests: object, logits: torch.Tensor) -> None:
            raise RuntimeError("device lost")

        runtime.on_logits = fail
        with pytest.raises(RuntimeError, match="device lost"):
            runtime.step()
        runtime.on_logits = None
        assert first.status is Status.FAILED
        assert "device lost" in str(first.reason)
        runtime.run()
    assert second.output == generated(of, second.prompt, 6)


def test_only_running_requests_fork() -> None:
    with serving(loaded("llama"), max_num_seqs=1) as runtime:
        request = runtime.add(greedy(text(5), 4))
        with pytest.raises(UserError, match="only a running request"):
            runtime.fork(request)
        runtime.step()
        with pytest.raises(UserError, match="max_num_seqs=1"):
            runtime.fork(request)
