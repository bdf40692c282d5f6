"""Compression beside the steps: the tokens of compression between them, whenever it is done and whoever wants its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoders import VOCAB, greedy, loaded, prompts, text
from forced_output import forced_logits
from hand_aside import HandAside
from kept_positions import turning
from prompt_policies import EVERY
from serving import LogitsByRequest, assert_nothing_lost
from torch import Tensor

from kvsuite.compression import get_policy
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime

# prompts of 10 and 3 blocks of 4; a pool for one of the long ones and what is left of others
LENGTHS = (38, 12, 40, 37, 11)
OUTPUT = 9


def made(name: str, own: dict[str, Any], **limits: Any) -> tuple[Any, Any, Limits]:
    policy = get_policy(name, **own) if name else None
    of = loaded("llama")
    small = {
        "max_model_len": 64, "max_num_seqs": 5, "max_num_batched_tokens": 40, "num_blocks": 16, "block_size": 4,
        "prefix_caching": False, "prefill_first": True,
    }  # fmt: skip
    return policy, None if policy is None else turning(of, policy), Limits(**(small | limits))


def served(
    name: str = "",
    own: dict[str, Any] | None = None,
    *,
    stage: Any = "sync",
    aside: HandAside | None = None,
    put_back: str = "",
    given: Sequence[list[int]] | None = None,
    overlap: bool = False,
    preempt_at: Sequence[int] = (),
    **limits: Any,
) -> tuple[list[Tensor], Runtime]:
    """Logits ``[output, vocab]`` of every request, and the runtime that gave them, closed."""
    policy, rotation, small = made(name, own or {}, **limits)
    runtime = Runtime(loaded("llama"), small, policy=policy, rotation=rotation, stage=stage, overlap=overlap)
    if put_back == "reuse":
        for table in runtime.tables:
            table.fence_of = lambda row: None
    texts = given if given is not None else prompts([length + OUTPUT for length in LENGTHS])
    found = forced_logits(runtime, texts, OUTPUT, aside=aside, preempt_at=preempt_at)
    if not put_back:
        assert_nothing_lost(runtime)
    return found, runtime


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@EVERY
def test_aside_gives_the_logits_of_between_the_steps(name: str, own: dict[str, Any]) -> None:
    wanted, between = served(name, {"factor": 3, **own})
    assert between.counters.evicted_tokens > 0
    assert_alike(served(name, {"factor": 3, **own}, stage="async")[0], wanted)
    late = HandAside()
    found, runtime = served(name, {"factor": 3, **own}, stage="async", aside=late)
    assert_alike(found, wanted)
    assert runtime.counters.evicted_tokens == between.counters.evicted_tokens
    assert len(late.fences) >= len(LENGTHS)


@EVERY
def test_a_factor_of_one_gives_the_logits_of_no_compression(name: str, own: dict[str, Any]) -> None:
    dense, _ = served()
    for stage in ("sync", "async"):
        found, runtime = served(name, {"factor": 1, **own}, stage=stage)
        assert_alike(found, dense)
        assert runtime.counters.evicted_tokens == 0


def test_blocks_that_are_wanted_again_wait_for_the_work_that_reads_them() -> None:
    """The first prompt's blocks are wanted by the second one's before the first is moved out of them."""
    wanted, _ = served("streaming_llm", {"start_size": 2, "factor": 3})
    late = HandAside()
    assert_alike(served("streaming_llm", {"start_size": 2, "factor": 3}, stage="async", aside=late)[0], wanted)
    assert late.waits > 0, "nobody wanted a block that was under way: the test shows nothing"


@pytest.mark.parametrize("name", ["streaming_llm", "knorm"])
def test_reuse_that_does_not_wait_would_be_seen(name: str) -> None:
    wanted, _ = served(name, {"factor": 3})
    found, _ = served(name, {"factor": 3}, stage="async", aside=HandAside(), put_back="reuse")
    assert any(not torch.allclose(own, other, atol=1e-3) for own, other in zip(found, wanted, strict=True))


def test_a_step_that_does_not_wait_for_what_it_reads_would_be_seen() -> None:
    """Flaw 14 of the original: decoding reads compressed tensors whose stream nobody waits for."""
    roomy = {"num_blocks": 64}
    wanted, _ = served("streaming_llm", {"factor": 3}, **roomy)
    late = HandAside(follows=False)
    found, _ = served("streaming_llm", {"factor": 3}, stage="async", aside=late, put_back="follow", **roomy)
    assert any(not torch.allclose(own, other, atol=1e-3) for own, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["streaming_llm", "uniform_stride", "knorm", "l2_compress"])
@pytest.mark.parametrize("identical", [True, False])
def test_the_prefix_cache_changes_nothing(name: str, identical: bool) -> None:
    """Flaw 5 of the original: shared blocks are compressed in place, and found again as if they held the prompt."""
    one = text(38, seed=1)
    given = [one + text(OUTPUT, seed=i) for i in range(4)]
    if not identical:
        given = [one[:20] + text(18 + OUTPUT, seed=i) for i in range(4)]
    limits: dict[str, Any] = {"given": given, "prefill_first": False}
    wanted, off = served(name, {"factor": 3}, prefix_caching=False, **limits)
    assert off.counters.prefix_hit_tokens == 0
    for aside in (None, HandAside(), HandAside()):
        found, on = served(name, {"factor": 3}, stage="async", aside=aside, prefix_caching=True, **limits)
        assert on.counters.prefix_hit_tokens > 0
        assert_alike(found, wanted)


@pytest.mark.parametrize("name", ["streaming_llm", "snapkv", "l2_compress"])
def test_a_request_is_preempted_while_it_is_compressed(name: str) -> None:
    wanted, _ = served(name, {"factor": 3}, num_blocks=64)
    late = HandAside()
    # the first step is the first prompt, whose work is given and not done then
    found, runtime = served(name, {"factor": 3}, stage="async", aside=late, num_blocks=64, preempt_at=(1, 3))
    assert runtime.counters.preemptions == 2
    assert_alike(found, wanted)


def begun(aside: HandAside, **limits: Any) -> tuple[Runtime, Request]:
    """A runtime with a request whose prompt of ten blocks is compressed to four, which is yet to be done."""
    policy, rotation, small = made("streaming_llm", {"factor": 3}, **limits)
    runtime = Runtime(loaded("llama"), small, policy=policy, rotation=rotation, stage="async", overlap=False)
    runtime.compression._aside = aside
    request = runtime.add(greedy(text(40), OUTPUT, forced=text(OUTPUT, seed=9)))
    runtime.step()
    assert request.compressed
    assert len(aside.queue) == 1
    return runtime, request


@pytest.mark.parametrize("how", ["cancel", "preempt"])
def test_what_is_under_way_keeps_its_blocks_after_its_request_has_gone(how: str) -> None:
    late = HandAside()
    runtime, request = begun(late)
    pool = runtime.tables[0].pool
    assert (pool.free, pool.held) == (2, 10)
    if how == "cancel":
        runtime.cancel(request)
    else:
        assert runtime.scheduler.preempt_for(greedy([1], 1))
    assert (pool.free, pool.held) == (2, 14), "the work will still write the four that it was given"
    late.do_all()
    assert (pool.free, pool.held) == (16, 0)
    runtime.close()
    assert_nothing_lost(runtime)


def test_a_fork_of_what_is_under_way_comes_behind_it() -> None:
    late = HandAside()
    runtime, request = begun(late, num_blocks=64)
    child = runtime.fork(request)
    child.forced = request.forced
    seen = LogitsByRequest(runtime)
    runtime.cancel(request)
    runtime.run()
    found = seen.of(child)
    runtime.close()
    wanted, _ = served("streaming_llm", {"factor": 3}, num_blocks=64, given=[text(40) + text(OUTPUT, seed=9)])
    torch.testing.assert_close(found, wanted[0][-len(found) :], atol=1e-5, rtol=1e-5)


def test_a_choice_by_hand_is_done_aside_too() -> None:
    keep = torch.arange(0, 13, 2)
    found = []
    for stage, aside in (("sync", None), ("async", HandAside())):
        policy, rotation, small = made("streaming_llm", {"factor": 3}, num_blocks=64)
        runtime = Runtime(loaded("llama"), small, policy=policy, rotation=rotation, stage=stage, overlap=False)
        if aside is not None:
            runtime.compression._aside = aside
        seen = LogitsByRequest(runtime)
        request = runtime.add(greedy(text(40), OUTPUT, forced=text(OUTPUT, seed=9)))
        runtime.step()
        runtime.compress(request, keep)
        assert int(runtime.tables[0].lengths[request.row]) == 7
        runtime.run()
        runtime.close()
        found.append(seen.of(request))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_a_request_that_is_computed_again_waits_for_the_next_choice() -> None:
    small = Limits(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=4, num_blocks=40, prefix_caching=False)
    runtime = Runtime(loaded("llama"), small)
    request = runtime.add(greedy(text(10), 20))
    while request.computed < 20:
        runtime.step()
    runtime.compress(request, torch.arange(0, 16, 2))
    assert runtime.scheduler.preempt_for(Request([1], request.sampling))
    while not 12 <= request.computed < 20:
        runtime.step()
    with pytest.raises(UserError, match=r"computed again, 12 of the 20 tokens .*; compress it when it is there"):
        runtime.compress(request, torch.arange(4))
    while request.computed < 20:
        runtime.step()
    assert int(runtime.tables[0].lengths[request.row]) == 8
    runtime.compress(request, torch.arange(4))
    runtime.run()
    runtime.close()
    assert request.status is Status.FINISHED
    assert_nothing_lost(runtime)


def test_a_choice_by_hand_between_the_steps_comes_behind_what_is_under_way_aside() -> None:
    """A controller may end the work aside while some of it is not done."""
    keep = torch.arange(0, 13, 2)
    found = []
    for stops in (False, True):
        runtime, request = begun(HandAside(), num_blocks=64)
        seen = LogitsByRequest(runtime)
        runtime.compression.works_aside = not stops
        runtime.compress(request, keep)
        runtime.run()
        runtime.close()
        found.append(seen.of(request))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_a_closed_runtime_leaves_no_work_that_would_write_to_its_pool() -> None:
    late = HandAside()
    runtime, _ = begun(late)
    runtime.close()
    assert not late.queue


@EVERY
def test_overlapped_steps_give_the_same_tokens(name: str, own: dict[str, Any]) -> None:
    policy_of = {"factor": 3, **own}
    found = []
    for overlap in (False, True):
        policy, rotation, small = made(name, policy_of)
        runtime = Runtime(loaded("llama"), small, policy=policy, rotation=rotation, stage="async", overlap=overlap)
        runtime.compression._aside = HandAside()
        requests = runtime.run([greedy(prompt, OUTPUT) for prompt in prompts(LENGTHS)])
        runtime.close()
        assert {request.status for request in requests} == {Status.FINISHED}
        found.append([request.output for request in requests])
    assert found[0] == found[1]


def test_a_policy_that_acts_after_every_token_is_refused_beside_the_steps() -> None:
    with pytest.raises(CaseInvalid, match=r"policy streaming_llm: .* use stage=sync, or give the policy a factor"):
        served("streaming_llm", {"recent_size": 8}, stage="async")
    with pytest.raises(UserError, match="stage=later"):
        served("streaming_llm", {"factor": 3}, stage="later")


def test_a_pool_without_room_for_what_stays_ends_the_request_and_loses_no_block() -> None:
    """Factor 1.1 keeps nearly everything, and a shared prefix gives nothing back."""
    prompt = text(40)
    policy, rotation, small = made("recent_only", {"factor": 1.1}, num_blocks=12, prefix_caching=True)
    runtime = Runtime(loaded("llama"), small, policy=policy, rotation=rotation, stage="async", overlap=False)
    late = HandAside()
    runtime.compression._aside = late
    requests = runtime.run([greedy(prompt, 3), greedy(prompt, 3)])
    assert {request.status for request in requests} == {Status.FINISHED}
    runtime.close()
    late.do_all()
    assert_nothing_lost(runtime)
    assert max(token for request in requests for token in request.output) < VOCAB
