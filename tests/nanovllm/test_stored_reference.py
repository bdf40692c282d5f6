"""Logits over packed pages are those of a plain forward pass over what is stored, and what is stored is what it writes."""

from __future__ import annotations

from typing import Any

import pytest
from decoders import greedy, loaded, text
from serving import serving
from stored_reference import StoredReference
from torch import Tensor

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.compression import get_policy
from kvsuite.nanovllm.runtime import Runtime

NEW = 8


def served(name: str, policy: str = "", *, doubled: bool = False, **limits: Any) -> tuple[StoredReference, Runtime]:
    chosen = get_policy(policy, factor=2) if policy else None
    small: dict[str, Any] = {
        "max_num_batched_tokens": 16, "num_blocks": 16, "block_size": 4, "cache_format": CacheFormat.parse(name),
    }  # fmt: skip
    with serving(loaded("qwen3"), policy=chosen, **small | limits) as runtime:
        seen = StoredReference(runtime)
        if doubled:
            backend: Any = runtime.runner.backend  # type: ignore[attr-defined]
            attend = backend.attend

            def twice(layer: int, query: Tensor, scale: float) -> Tensor:
                return 2 * attend(layer, query, scale)

            backend.attend = twice
        texts = [text(length + NEW, seed=length) for length in (1, 25, 21, 14)]
        runtime.run([greedy(each[:-NEW], NEW, forced=each[-NEW:]) for each in texts])
    return seen, runtime


@pytest.mark.parametrize(
    ("name", "policy", "limits"),
    [
        ("auto", "", {}), ("int4+hadamard:fp8_e4m3", "", {}), ("int8:int4(group=4)", "streaming_llm", {}),
        ("int8:int4(group=4)", "", {"sliding_window": 10, "attention_sinks": 2, "num_blocks": 40}),
    ],
)  # fmt: skip
def test_logits_are_those_of_what_is_stored(name: str, policy: str, limits: dict[str, Any]) -> None:
    seen, runtime = served(name, policy, **limits)
    assert policy or limits or runtime.counters.preemptions
    logits, stored = seen.errors(loaded("qwen3"))
    assert logits < 1e-5
    # a number between two codes may take either, which is about as far
    assert stored < 1e-3
    assert seen.farthest(seen) == 0


def test_attention_that_reads_something_else_is_found() -> None:
    seen, _ = served("int8", doubled=True)
    logits, _ = seen.errors(loaded("qwen3"))
    assert logits > 1e-2


def test_other_tokens_are_found() -> None:
    seen, other = (served("int8", policy)[0] for policy in ("streaming_llm", "recent_only"))
    assert seen.farthest(other) > 0.5
