"""Requests that come at their times: what is measured of each, and that company, order and preemption change no token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCAB, forward, generated, loaded, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.compression import get_policy
from kvsuite.engines.nano.under_load import serve_under_load
from kvsuite.engines.results import RequestServed, Served, ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.scoring import score_steps

STEP_S = 0.01
LENGTHS = (30, 9, 12, 41, 13, 22)


@contextmanager
def serving(*, policy: Any = None, lanes: int = 1, **limits: Any) -> Iterator[Runtime]:
    small = {"max_model_len": 96, "max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 64}
    runtime = Runtime(loaded("llama"), Limits(**(small | limits)), policy=policy, lanes=lanes)
    try:
        yield runtime
    finally:
        runtime.close()
        assert all(table.pool.used == 0 for table in runtime.tables)


def preempting(runtime: Runtime, after: Sequence[int] = (4, 9, 15, 22)) -> Runtime:
    """Take the blocks of the request admitted last away after some steps: by itself the scheduler admits what fits.

    A few times only: who is resumed under a policy computes its output token by token again, and would never be done.
    """
    step, calls = runtime.step, itertools.count(1)

    def stepped() -> list[Request]:
        ended = step()
        if next(calls) in after:
            runtime.scheduler.preempt_for(Request([1]))
        return ended

    runtime.step = stepped  # type: ignore[method-assign]
    return runtime


class HostTime:
    """The host's clock, which only sleeping and computing move: every forward pass takes `STEP_S`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
        self.now, self.slept = 100.0, []
        fake = SimpleNamespace(perf_counter=lambda: self.now, sleep=self._sleep)
        for module in ("engines.nano.under_load", "nanovllm.delivery", "nanovllm.scheduler"):
            monkeypatch.setattr(f"kvsuite.{module}.time", fake)
        run = runtime.runner.run

        def slow(batch: Any) -> Any:
            self.now += STEP_S
            return run(batch)

        monkeypatch.setattr(runtime.runner, "run", slow)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


@contextmanager
def clocked(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> Iterator[tuple[Runtime, HostTime]]:
    with serving(**limits) as runtime:
        yield runtime, HostTime(monkeypatch, runtime)


def about(*values: float) -> Any:
    return pytest.approx(values, abs=1e-9)


def test_open_loop_counts_from_the_scheduled_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = prompts((8, 9, 10))
    with clocked(monkeypatch) as (runtime, host):
        # in any order; the second comes in the middle of a step, the third when nobody is there
        asked = [ServeRequest(third, 2, 1.0), ServeRequest(first, 1), ServeRequest(second, 2, 0.004)]
        late, now, during = serve_under_load(runtime, asked).requests
    assert now.token_s == about(0.01)
    assert (now.arrival_s, now.admitted_s) == about(0, 0)
    # taken up when the step was over, and due all the same from 0.004 on
    assert (during.arrival_s, during.admitted_s, *during.token_s) == about(0.004, 0.01, 0.02, 0.03)
    assert (late.arrival_s, late.admitted_s, *late.token_s) == about(1.0, 1.0, 1.01, 1.02)
    assert host.slept == about(0.97)


def test_closed_loop_keeps_so_many_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with clocked(monkeypatch) as (runtime, host):
        asked = [
            ServeRequest(prompt, tokens) for prompt, tokens in zip(prompts((8, 8, 8, 8)), (3, 1, 2, 1), strict=True)
        ]
        served = serve_under_load(runtime, asked, concurrency=2)
    # a request comes when one is over: the second ends after one step, the third after two more
    assert [one.arrival_s for one in served.requests] == about(0, 0, 0.01, 0.03)
    assert [one.token_s[-1] for one in served.requests] == about(0.03, 0.01, 0.03, 0.04)
    assert max(step.running + step.waiting for step in served.steps) <= 2
    assert not host.slept


def test_closed_loop_takes_no_arrivals() -> None:
    with serving() as runtime, pytest.raises(ValueError, match="concurrency=2"):
        serve_under_load(runtime, [ServeRequest([5, 6], 2, 0.5)], concurrency=2)


def test_what_never_fits_is_said_in_a_line() -> None:
    with serving(num_blocks=3) as runtime:
        with pytest.raises(CaseInvalid, match=r"request of 60 tokens: .*the pool has 3"):
            serve_under_load(runtime, [ServeRequest(prompts((60,))[0], 8)])
        assert runtime.unfinished == 0


def crowded(runtime: Runtime, **of_all: Any) -> Served:
    """Six requests in a pool for two."""
    asked = [ServeRequest(prompt, 20, **of_all) for prompt in prompts(LENGTHS)]
    return serve_under_load(runtime, asked)


@pytest.mark.parametrize("lanes", [1, 2])
def test_steps_and_requests_tell_what_the_counters_tell(lanes: int) -> None:
    with serving(lanes=lanes, num_blocks=6, block_size=16, max_num_batched_tokens=24) as runtime:
        served = crowded(preempting(runtime))
        assert served.counts["preemptions"] > 0
        assert runtime.on_lane_step is None
    assert {step.lane for step in served.steps} == ({"both"} if lanes == 1 else {"prompt", "decode"})
    steps, requests, counts = served.steps, served.requests, served.counts
    assert len(steps) == counts["steps"]
    # a last token that a resumed request computes again is the prompt lane's, and one of decoding where there are no lanes
    resumed = sum(step.prompt_tokens for step in steps) - counts["computed_prefill_tokens"]
    assert resumed == counts["computed_decode_tokens"] - sum(step.decode_tokens for step in steps)
    assert 0 <= resumed <= (0 if lanes == 1 else counts["preemptions"])
    assert max(step.used_blocks for step in steps) <= 6
    assert max(step.waiting for step in steps) >= 3
    for lane in ("both", "prompt", "decode"):
        for earlier, later in itertools.pairwise(step for step in steps if step.lane == lane):
            assert earlier.start_s <= earlier.end_s <= later.start_s
    assert sum(one.preemptions for one in requests) == counts["preemptions"]
    fed = counts["computed_prefill_tokens"] + counts["computed_decode_tokens"]
    assert sum(one.computed_prompt_tokens + 19 for one in requests) == fed
    assert sum(one.cached_tokens for one in requests) == counts["prefix_hit_tokens"]
    for one, length in zip(requests, LENGTHS, strict=True):
        assert one.prompt_tokens == length
        assert (one.stored_tokens, one.evicted_tokens) == (length + 19, 0)
        if not one.preemptions:
            assert one.computed_prompt_tokens == length - one.cached_tokens


def test_tokens_that_a_policy_removed_are_told() -> None:
    policy = get_policy("streaming_llm", start_size=3, recent_size=9, skip_layers=[0])
    with serving(policy=policy) as runtime:
        served = crowded(runtime)
    for one, length in zip(served.requests, LENGTHS, strict=True):
        # one of three layers keeps everything
        assert one.stored_tokens == pytest.approx((2 * 12 + length + 19) / 3)
        assert one.evicted_tokens == pytest.approx(2 * (length + 19 - 12) / 3)


POLICIES = [None, ("streaming_llm", {"start_size": 3, "recent_size": 9}), ("tova", {"keep_ratio": 0.5})]


@pytest.mark.parametrize("named", POLICIES)
def test_any_arrival_order_gives_equal_outputs(named: tuple[str, dict[str, Any]] | None) -> None:
    policy = None if named is None else get_policy(named[0], **named[1])
    texts = prompts(LENGTHS)
    with serving(policy=policy, prefix_caching=False) as runtime:
        alone = [serve_under_load(runtime, [ServeRequest(prompt, 10)]).outputs[0] for prompt in texts]
    if policy is None:
        assert alone == [generated(loaded("llama"), prompt, 10) for prompt in texts]

    def in_order(order: Sequence[int], gap: float) -> None:
        limits: Any = {"num_blocks": 6, "max_num_batched_tokens": 24, "prefix_caching": named is None}
        asked: list[Any] = [None] * len(texts)
        for place, index in enumerate(order):
            asked[index] = ServeRequest(texts[index], 10, place * gap)
        with serving(policy=policy, **limits) as runtime:
            assert serve_under_load(preempting(runtime), asked).outputs == alone

    given(order=st.permutations(range(len(texts))), gap=st.sampled_from([0.0, 0.004]))(
        settings(max_examples=3, derandomize=True)(in_order)
    )()


@pytest.mark.parametrize("lanes", [1, 2])
def test_forced_output_is_scored_whatever_the_company(lanes: int) -> None:
    model = loaded("llama")
    texts = prompts([length + 20 for length in LENGTHS])
    asked = [ServeRequest(tokens[:-20], 20, 0.002 * index, forced=tokens[-20:]) for index, tokens in enumerate(texts)]
    # one chooses for itself among those that are forced
    asked.append(ServeRequest(texts[0][:17], 20, 0.001))
    with serving(lanes=lanes, num_blocks=6, max_num_batched_tokens=24) as runtime:
        served = serve_under_load(preempting(runtime), asked)
        assert served.counts["preemptions"] > 0
    for tokens, output, one in zip(texts, served.outputs, served.requests, strict=False):
        assert output == tokens[-20:]
        logits = forward(model, tokens)[-21:-1].float().log_softmax(-1)
        assert one.scores is not None
        assert one.scores.rows is None
        wanted = -logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert one.scores.nll == pytest.approx(wanted.tolist(), abs=1e-4)
        assert one.scores.top1 == logits.argmax(-1).tolist()
    assert served.requests[-1].scores is None
    assert served.outputs[-1] == generated(model, texts[0][:17], 20)


@pytest.mark.parametrize("named", POLICIES[1:])
def test_forced_output_is_scored_through_the_compressed_cache(named: tuple[str, dict[str, Any]]) -> None:
    policy = get_policy(named[0], **named[1])
    texts = prompts([length + 20 for length in LENGTHS])
    asked = [ServeRequest(tokens[:-20], 20, forced=tokens[-20:]) for tokens in texts]
    with serving(policy=policy, prefix_caching=False) as runtime:
        alone = [score_steps(runtime, tokens[:-20], tokens[-20:]) for tokens in texts]
    with serving(policy=policy, num_blocks=5, prefix_caching=False) as runtime:
        served = serve_under_load(preempting(runtime), asked)
        assert served.counts["preemptions"] > 0
    assert max(step.running for step in served.steps) > 1
    for one, wanted in zip(served.requests, alone, strict=True):
        assert one.scores is not None
        assert one.scores.nll == pytest.approx(wanted.nll, abs=1e-4)


def _rows(one: RequestServed) -> Any:
    assert one.scores is not None
    assert one.scores.rows is not None
    return one.scores.rows


@pytest.mark.parametrize("width", [8, VOCAB, VOCAB + 100])
def test_log_probabilities_of_the_likeliest_tokens_and_of_the_rest(width: int) -> None:
    model, prompt = loaded("llama"), prompts((30,))[0]
    with serving() as runtime:
        # chosen, not forced: the same positions once more, with the tokens given
        free = serve_under_load(runtime, [ServeRequest(prompt, 12, rows=width)])
        again = ServeRequest(prompt, 12, forced=free.outputs[0], rows=_rows(free.requests[0]).ids)
        forced = serve_under_load(runtime, [again, replace(again, arrival_s=0.001)])
    whole = forward(model, prompt + free.outputs[0])[-13:-1].float().log_softmax(-1)
    kept = min(width, VOCAB)
    for one in (*free.requests, *forced.requests):
        rows = _rows(one)
        assert rows.ids.shape == (12, kept)
        expected = whole.gather(1, torch.from_numpy(rows.ids).long())
        np.testing.assert_allclose(rows.log_p, expected.numpy(), atol=1e-4)
        if kept < VOCAB:
            np.testing.assert_allclose(np.exp(rows.log_rest), 1 - expected.exp().sum(-1).numpy(), atol=1e-5)
        else:
            assert (rows.log_rest == -math.inf).all()
    np.testing.assert_array_equal(_rows(free.requests[0]).ids[:, 0], free.outputs[0])


def test_rows_of_two_widths_are_no_one_table() -> None:
    with serving() as runtime, pytest.raises(ValueError, match=r"\[4, 8\] log-probabilities"):
        serve_under_load(runtime, [ServeRequest([5], 2, rows=4), ServeRequest([6], 2, rows=8)])


def test_a_request_is_what_it_says() -> None:
    with pytest.raises(ValueError, match="2 tokens where new_tokens=3"):
        ServeRequest([5], 3, forced=[1, 2])
    for arrival in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="arrival_s"):
            ServeRequest([5], 3, arrival)


def test_what_runs_in_a_step_is_counted_though_it_is_over_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of one token each: at the end of every step nobody holds a block."""
    with clocked(monkeypatch) as (runtime, _):
        served = serve_under_load(runtime, [ServeRequest(prompt, 1) for prompt in prompts((8, 9, 10))])
    assert sum(step.running for step in served.steps) == 3
    with clocked(monkeypatch) as (runtime, _):
        served = serve_under_load(runtime, [ServeRequest(prompts((8,))[0], 3)])
    assert [step.running for step in served.steps] == [1, 1, 1]
