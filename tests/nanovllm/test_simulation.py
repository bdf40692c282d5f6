"""Simulated serving against arithmetic, and against a runtime whose step times it is given."""

from __future__ import annotations

import time
from typing import Any

import pytest
from decoders import greedy, loaded, text

from kvsuite.compression import get_policy
from kvsuite.errors import UserError
from kvsuite.models.load import LoadedModel, load_model
from kvsuite.models.resolve import resolve_model
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.simulation import AffineStepTime, Arrival, StepWork, simulate

SECOND = AffineStepTime(1.0)


def limits(**more: Any) -> Limits:
    sizes: dict[str, Any] = {"max_model_len": 400, "max_num_seqs": 8, "max_num_batched_tokens": 2048, "num_blocks": 69}
    return Limits(**(sizes | {"prefix_caching": False, "prefill_first": True} | more))


def test_one_request_by_hand() -> None:
    costs = AffineStepTime(1.0, prompt_token_s=0.1, decode_row_s=0.01, kv_token_s=0.001)
    found = simulate([Arrival(20, 3, arrival_s=5.0)], limits(max_num_batched_tokens=12), costs)
    [request] = found.requests
    # two chunks of the prompt, then decode steps over 21 and 22 stored tokens
    first = 5.0 + (1 + 1.2) + (1 + 0.8)
    assert request.token_s == pytest.approx([first, first + 1.031, first + 1.031 + 1.032])
    assert request.ttft_s == pytest.approx(4.0)
    assert request.tpot_s == pytest.approx(1.0315)
    assert (request.admitted_s, request.computed_tokens) == (5.0, 20)
    assert [step.work.prompt_tokens for step in found.steps] == [12, 8, 0, 0]
    assert found.output_tokens_s == pytest.approx(3 / found.seconds)


def test_prompts_beside_decoding_in_chunks() -> None:
    costs = AffineStepTime(0.0, prompt_token_s=1.0, decode_row_s=1.0)
    arrivals = [Arrival(4, 4), Arrival(9, 1, arrival_s=1.0)]
    found = simulate(arrivals, limits(max_num_batched_tokens=8, prefill_first=False), costs)
    # the first decodes in every step, the second gets the 7 tokens that are left
    assert [(step.work.prompt_tokens, step.work.decode_rows) for step in found.steps] == [
        (4, 0),
        (7, 1),
        (2, 1),
        (0, 1),
    ]
    assert found.requests[0].token_s == [4.0, 12.0, 15.0, 16.0]
    assert found.requests[1].token_s == [15.0]


def test_two_lanes_are_two_clocks() -> None:
    def costs(work: StepWork) -> float:
        return 10.0 if work.lane == "prompt" else 1.0 if work.beside is None else 2.0

    found = simulate([Arrival(16, 13), Arrival(16, 1, arrival_s=12.0)], limits(), costs, lanes=2)
    # the first one's prompt; steps that are launched beside the second's, from 12 to 22, take longer
    assert found.requests[0].token_s == [10, 11, 12, 13, 15, 17, 19, 21, 23, 24, 25, 26, 27]
    assert found.requests[1].token_s == [22]
    alone = simulate([Arrival(16, 13), Arrival(16, 1, arrival_s=12.0)], limits(), costs)
    assert [step.work.lane for step in alone.steps] == ["both"] * len(alone.steps)


def test_who_was_preempted_comes_back_when_nobody_else_is_left() -> None:
    def costs(work: StepWork) -> float:
        return 6.0 if work.lane == "prompt" else 1.0

    few = limits(admission="optimistic", num_blocks=4, block_size=4, max_model_len=16, max_num_batched_tokens=8)
    found = simulate([Arrival(4, 8), Arrival(8, 4, arrival_s=7.0)], few, costs, lanes=2)
    # the first one took the second's blocks while its prompt was computed, and was over before that lane planned again
    assert found.requests[1].preemptions == 1
    assert [len(request.token_s) for request in found.requests] == [8, 4]


@pytest.mark.parametrize(
    ("admission", "steps", "preemptions", "computed"), [("reserve", 211, 0, 2560), ("optimistic", 193, 2, 3284)]
)
def test_eight_requests_in_a_pool_for_two(admission: str, steps: int, preemptions: int, computed: int) -> None:
    found = simulate([Arrival(320, 64)] * 8, limits(admission=admission), SECOND)
    assert len(found.steps) == steps
    assert sum(request.preemptions for request in found.requests) == preemptions
    assert sum(request.computed_tokens for request in found.requests) == computed


def test_what_compression_will_free_is_counted() -> None:
    policy = get_policy("knorm", keep_ratio=0.2)
    found = simulate([Arrival(320, 64)] * 8, limits(), SECOND, policy=policy)
    # three prompts, three, two; then all eight decode to their end: 64 + 63 tokens are 8 blocks each
    assert len(found.steps) == 3 + 64
    assert found.mean_running > 7.5
    assert max(step.used_blocks for step in found.steps) == 64
    # the prompt has to fit while it is computed
    with pytest.raises(UserError, match="does not fit even alone"):
        simulate([Arrival(320, 64)], limits(num_blocks=19), SECOND, policy=policy)


def test_prefixes_are_found() -> None:
    prompt = list(range(3, 100))
    found = simulate([Arrival(prompt, 2), Arrival(prompt, 2, arrival_s=9.0)], limits(prefix_caching=True), SECOND)
    assert [request.cached_tokens for request in found.requests] == [0, 96]
    assert [request.computed_tokens for request in found.requests] == [97, 1]


def test_bad_input() -> None:
    with pytest.raises(UserError, match="give the pool in blocks"):
        simulate([Arrival(3, 3)], Limits(), SECOND)
    with pytest.raises(UserError, match="a step takes time"):
        simulate([Arrival(3, 3)], limits(), AffineStepTime(0.0))
    with pytest.raises(UserError, match="390 \\+ 20 tokens in max_model_len=400"):
        simulate([Arrival(390, 20)], limits(), SECOND)


def measured(runtime: Runtime, arrivals: list[Arrival]) -> tuple[list[list[float]], list[float]]:
    """Serve requests that come at once; seconds from the start to each token, and of every step."""
    requests = [greedy(list(arrival.prompt), arrival.new_tokens) for arrival in arrivals]  # type: ignore[arg-type]
    began = last = time.perf_counter()
    seconds: list[float] = []
    for request in requests:
        runtime.add(request)
    marks: list[list[float]] = [[] for _ in requests]
    while runtime.unfinished:
        runtime.step()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        for request, own in zip(requests, marks, strict=True):
            own += [now - began] * (len(request.times) - len(own))
    return marks, seconds


def compare(model: LoadedModel, policy: Any, **more: Any) -> None:
    """A simulation that is given the step times of a run has the run's steps, preemptions and times of every token."""
    chosen = None if policy is None else get_policy(policy[0], **policy[1])
    arrivals = [Arrival(text(length, seed=length), 18) for length in (40, 17, 33, 9, 50)]
    own = limits(max_model_len=96, max_num_seqs=4, max_num_batched_tokens=24, block_size=4, num_blocks=26, **more)
    runtime = Runtime(model, own, policy=chosen)
    marks, seconds = measured(runtime, arrivals)
    preempted = runtime.counters.preemptions
    runtime.close()
    left = iter(seconds)
    found = simulate(arrivals, own, lambda work: next(left), policy=chosen)
    assert len(found.steps) == len(seconds)
    assert sum(request.preemptions for request in found.requests) == preempted
    for request, wanted in zip(found.requests, marks, strict=True):
        assert request.token_s == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("policy", [None, ("knorm", {"keep_ratio": 0.25})], ids=["dense", "compressed"])
@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
@pytest.mark.parametrize("prefill_first", [False, True])
def test_it_gives_a_runtimes_times_for_its_step_times(policy: Any, admission: str, prefill_first: bool) -> None:
    compare(loaded("llama"), policy, admission=admission, prefill_first=prefill_first)


def test_it_gives_the_times_of_smollm2() -> None:
    model = load_model(resolve_model("smollm2"), device="cpu", dtype="float32")
    compare(model, ("knorm", {"keep_ratio": 0.25}), prefill_first=False)
