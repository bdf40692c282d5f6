"""Prompts in chunks beside decoding: everybody gets what he gets alone, whatever pool, chunks and order of arrival."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from decoders import generated, greedy, loaded, text
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving

from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy

NEW = 14
LENGTHS = (1, 9, 16, 30, 47)
POLICIES: dict[str, Any] = {"dense": None, "knorm": {"keep_ratio": 0.3}, "snapkv": {"keep_ratio": 0.5, "window": 4}}


def prompt_of(length: int) -> list[int]:
    # some begin alike
    return text(47)[:length] if length != 30 else text(30, seed=3)


@functools.cache
def policy_of(name: str) -> Policy | None:
    return None if POLICIES[name] is None else get_policy(name, **POLICIES[name])


@functools.cache
def alone(name: str, length: int) -> list[int]:
    """The output in a pool for itself, its prompt in one step; of ``transformers.generate`` where nothing is removed."""
    of = loaded("llama")
    if name == "dense":
        return generated(of, prompt_of(length), NEW)
    with serving(of, policy=policy_of(name), prefix_caching=False, max_num_batched_tokens=256) as runtime:
        [request] = runtime.run([greedy(prompt_of(length), NEW)])
        return request.output


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=6)
@given(
    order=st.permutations((*LENGTHS, 16, 47)),
    gaps=st.lists(st.integers(0, 6), min_size=7, max_size=7),
    tokens=st.sampled_from([8, 11, 32]),
    blocks=st.integers(16, 40),
    prefill_first=st.booleans(),
    prefix_caching=st.booleans(),
    admission=st.sampled_from(["reserve", "optimistic"]),
)
def test_tokens_are_those_of_each_alone(
    name: str, order: list[int], gaps: list[int], tokens: int, blocks: int, prefill_first: bool, prefix_caching: bool,
    admission: str,
) -> None:  # fmt: skip
    policy, expected = policy_of(name), [alone(name, length) for length in order]
    caching = prefix_caching and not (policy is not None and policy.needs.looks_at_queries)
    with serving(
        loaded("llama"), policy=policy, block_size=4, max_num_batched_tokens=tokens, num_blocks=blocks,
        prefill_first=prefill_first, prefix_caching=caching, admission=admission,
    ) as runtime:  # fmt: skip
        requests = []
        for length, gap in zip(order, gaps, strict=True):
            requests.append(runtime.add(greedy(prompt_of(length), NEW)))
            for _ in range(gap):
                runtime.step()
        while runtime.unfinished:
            runtime.step()
        if admission == "reserve":
            assert runtime.counters.preemptions == 0
    assert [request.output for request in requests] == expected
