"""Policies that act on every token decide for all sequences of a step at once: as for each of them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from decoders import loaded, text
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Launches
from serving import serving
from test_paged_compression import rotation_of
from torch import Tensor

from kvsuite.compression import get_policy
from kvsuite.compression.base import CacheView, Policy, time_order
from kvsuite.compression.fix_size_l2 import FixSizeL2
from kvsuite.compression.streaming_llm import StreamingLLM
from kvsuite.errors import UserError
from kvsuite.nanovllm.decode_eviction import DecodeEviction
from kvsuite.nanovllm.request import Request, Status
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters

POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("streaming_llm", {"start_size": 2, "recent_size": 7}),
    ("recent_only", {"window": 9}),
    ("l2_compress", {"keep_ratio": 0.5, "prune_after": 11, "mode": "every_token"}),
    ("l2_compress", {"keep_ratio": 0.7, "prune_after": 9, "mode": "interval=4"}),
    ("fix_size_l2", {"size": 9, "keep_ratio": 0.25, "strategy": "keep_low"}),
    ("fix_size_l2", {"size": 10, "keep_ratio": 0.25, "strategy": "random", "seed": 5}),
)
#: parts of the prompts, so that prefixes are found
TEXT = text(40, seed=7)


def stored(runtime: Runtime, request: Request) -> Tensor:
    """Keys of a request in the order of its table, ``[layers, kv_heads, n, head_dim]``."""
    return runtime.pools[0].keys_of(torch.from_numpy(runtime.tables[0].stored_slots(request.row)))


def served(
    policy: Policy, lengths: list[int], *, forked: int, preempted: list[int], caching: bool
) -> list[tuple[list[int], list[Tensor]]]:
    """Output of every request, and the keys that it stores after every step."""
    of = loaded("llama")
    found: dict[str, list[Tensor]] = {}
    with serving(of, policy=policy, rotation=rotation_of(of, policy), block_size=4, prefix_caching=caching) as runtime:
        sampling = SamplingParameters(max_new_tokens=12, temperature=0.0, ignore_eos=True)
        requests = [runtime.add(Request(TEXT[:length], sampling)) for length in lengths]
        while runtime.unfinished:
            runtime.step()
            steps = runtime.counters.steps
            if steps == forked and requests[0].status is Status.RUNNING:
                requests.append(runtime.fork(requests[0]))
            if steps in preempted:
                runtime.scheduler.preempt_for(Request([1], sampling))
            for request in requests:
                if request.row >= 0 and request.computed >= request.prompt_length:
                    found.setdefault(request.id or "", []).append(stored(runtime, request))
    return [(request.output, found.get(request.id or "", [])) for request in requests]


@pytest.mark.parametrize(("name", "parameters"), POLICIES)
@settings(max_examples=4)
@given(
    positions=st.sampled_from(["original", "cache"]),
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    forked=st.integers(2, 12),
    preempted=st.lists(st.integers(2, 14), max_size=2),
    caching=st.booleans(),
)
def test_together_is_one_by_one(
    name: str,
    parameters: dict[str, Any],
    positions: str,
    lengths: list[int],
    forked: int,
    preempted: list[int],
    caching: bool,
) -> None:
    found = []
    for together in (True, False):
        policy = get_policy(name, positions=positions, **parameters)
        assert policy.sequences_apart
        policy.sequences_apart = together  # type: ignore[misc]
        found.append(served(policy, lengths, forked=forked, preempted=preempted, caching=caching))
    for (tokens, keys), (expected, expected_keys) in zip(*found, strict=True):
        assert tokens == expected
        assert all(map(torch.equal, keys, expected_keys))
        assert len(keys) == len(expected_keys)


@dataclass(kw_only=True, eq=False)
class _Oldest(Policy):
    """The first tokens stay for good, and the newest one goes."""

    name: ClassVar[str] = "oldest"
    sequences_apart: ClassVar[bool] = True
    says_rule: bool = True

    def size_after(self, length: int) -> int:
        return min(length, 6)

    def keep(self, view: CacheView) -> Tensor:
        return time_order(view)[..., : self.size_after(view.length)]

    def victim(self, view: CacheView) -> Tensor:
        return view.positions.argmax(-1)

    def oldest_rule(self, length: int) -> int | None:
        return length - 1 if self.says_rule else None


def test_the_rule_may_leave_the_newest_token_alone_to_go() -> None:
    found = [served(_Oldest(says_rule=rule), [10, 3], forked=5, preempted=[7], caching=False) for rule in (True, False)]
    assert all(len(tokens) == 12 for tokens, _ in found[0])
    for (tokens, keys), (expected, expected_keys) in zip(*found, strict=True):
        assert tokens == expected
        assert all(map(torch.equal, keys, expected_keys))


@pytest.mark.parametrize(("length", "caching"), [(20, False), (6, False), (6, True)])
@pytest.mark.parametrize(("name", "parameters"), [POLICIES[0], POLICIES[4]])
def test_more_sequences_are_not_more_launches(
    name: str, parameters: dict[str, Any], length: int, caching: bool
) -> None:
    # prompts within the budget as well, and blocks that are a sequence's own once each of them was written
    counts = []
    for sequences in (2, 7):
        policy = get_policy(name, **parameters)
        with serving(loaded("llama"), policy=policy, prefix_caching=caching, block_size=4) as runtime:
            sampling = SamplingParameters(max_new_tokens=24, temperature=0.0, ignore_eos=True)
            requests = [runtime.add(Request(text(length, seed=seed), sampling)) for seed in range(sequences)]
            while any(request.computed < 24 for request in requests):
                runtime.step()
            after_step = runtime.compression.after_step
            launches = Launches()

            def counted(due: Any, after_step: Any = after_step, launches: Launches = launches) -> None:
                with launches:
                    after_step(due)

            runtime.compression.after_step = counted  # type: ignore[method-assign]
            runtime.step()
            counts.append(launches.count)
            runtime.run()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("caching", [False, True], ids=["own blocks", "findable blocks"])
@pytest.mark.parametrize(("name", "parameters"), POLICIES[:2])
def test_nothing_is_asked_while_one_token_goes_after_every_step(
    name: str, parameters: dict[str, Any], caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # prompts of other lengths, one that comes later, a fork, a choice by hand: whoever is not steady is asked for alone
    decided: list[int] = []
    decide = DecodeEviction.decide

    def spied(self: DecodeEviction, rows: Any, seen: Any, **given: Any) -> Any:
        decided.extend(rows.tolist())
        return decide(self, rows, seen, **given)

    monkeypatch.setattr(DecodeEviction, "decide", spied)
    with serving(
        loaded("llama"), policy=get_policy(name, **parameters), prefix_caching=caching, block_size=4
    ) as runtime:
        sampling = SamplingParameters(max_new_tokens=60, temperature=0.0, ignore_eos=True)
        requests = [runtime.add(Request(text(length, seed=length), sampling)) for length in (20, 9, 12)]
        for _ in range(16):
            runtime.step()
        decided.clear()
        runtime.step()
        assert decided == []
        late = runtime.add(Request(text(30), sampling))
        runtime.step()
        assert decided == [late.row]
        for _ in range(12):
            runtime.step()
        decided.clear()
        child = runtime.fork(requests[0])
        runtime.step()
        assert sorted(decided) == sorted([requests[0].row, child.row])
        for _ in range(12):
            runtime.step()
        decided.clear()
        runtime.step()
        assert decided == []
        runtime.compress(requests[1], torch.arange(1, 9))
        runtime.step()
        assert sorted(decided) == sorted(request.row for request in [*requests, late, child])


def test_a_policy_that_raises_for_one_sequence_of_many_costs_that_one() -> None:
    class Picky(StreamingLLM):
        def victim(self, view: CacheView) -> Tensor:
            if torch.as_tensor(view.newest == 27).any():
                raise ArithmeticError("27")
            return super().victim(view)

    with serving(loaded("llama"), policy=Picky(start_size=2, recent_size=7), prefix_caching=False) as runtime:
        sampling = SamplingParameters(max_new_tokens=6, temperature=0.0, ignore_eos=True)
        requests = runtime.run([Request(text(length), sampling) for length in (20, 24, 12)])
    assert [request.status for request in requests] == [Status.FINISHED, Status.FAILED, Status.FINISHED]
    assert requests[1].reason == "compressing it failed: ArithmeticError: 27"
    with serving(loaded("llama"), policy=get_policy(POLICIES[0][0], **POLICIES[0][1]), prefix_caching=False) as runtime:
        [alone] = runtime.run([Request(text(20), sampling)])
    assert requests[0].output == alone.output


@pytest.mark.parametrize("caching", [False, True], ids=["own blocks", "findable blocks"])
def test_a_choice_that_cannot_be_carried_out_costs_the_one_sequence(caching: bool) -> None:
    class Beyond(StreamingLLM):
        def victim(self, view: CacheView) -> Tensor:
            found = super().victim(view)
            return torch.where(torch.as_tensor(view.newest == 10).view_as(found), 10_000, found)

    sampling = SamplingParameters(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    found = []
    for kind, lengths in ((Beyond, (5, 6, 4)), (StreamingLLM, (5,))):
        policy = kind(start_size=2, recent_size=7)
        with serving(loaded("llama"), policy=policy, prefix_caching=caching, block_size=4) as runtime:
            found.append(runtime.run([Request(text(length), sampling) for length in lengths]))
    (requests, [alone]) = found
    assert [request.status for request in requests] == [Status.FINISHED, Status.FAILED, Status.FINISHED]
    assert "compressing it failed: " in str(requests[1].reason)
    assert requests[0].output == alone.output


class _AloneOnly(FixSizeL2):
    """Decides for one sequence and not for several."""

    def victim(self, view: CacheView) -> Tensor:
        if view.scores is not None and view.scores.dim() > 3:
            raise RuntimeError("several at once")
        return super().victim(view)


def test_what_cannot_be_decided_together_is_decided_one_by_one() -> None:
    sampling = SamplingParameters(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    tokens = []
    for policy in (_AloneOnly(size=8), FixSizeL2(size=8)):
        with serving(loaded("llama"), policy=policy, prefix_caching=False, block_size=4) as runtime:
            requests = runtime.run([Request(text(12, seed=seed), sampling) for seed in range(3)])
        assert [request.status for request in requests] == [Status.FINISHED] * 3, [one.reason for one in requests]
        tokens.append([request.output for request in requests])
    assert tokens[0] == tokens[1]


def test_a_choice_by_head_is_refused_where_one_decision_serves_every_head() -> None:
    policy = get_policy("streaming_llm", start_size=2, recent_size=7)
    with serving(loaded("llama"), policy=policy, prefix_caching=False) as runtime:
        sampling = SamplingParameters(max_new_tokens=6, temperature=0.0, ignore_eos=True)
        request = runtime.add(Request(text(20), sampling))
        runtime.step()
        with pytest.raises(UserError, match="streaming_llm goes on deciding for all heads at once; give one list"):
            runtime.compress(request, torch.zeros(3, 2, 1, dtype=torch.int64))
        runtime.run()
    assert len(request.output) == 6
