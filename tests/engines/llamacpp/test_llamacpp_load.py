"""Requests under load in llama.cpp: their order, what a step feeds, and tokens that are those of each request alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hf_sessions import random_tokens
from llamacpp_sessions import case_of, needs_library, widened_session

from kvsuite.case import Case
from kvsuite.engines.capabilities import ServesUnderLoad
from kvsuite.engines.llamacpp.engine import LlamacppEngine
from kvsuite.engines.llamacpp.session import LlamacppSession
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.engines.serving_plan import SERVING_PARAM, ServingPlan
from kvsuite.errors import CaseInvalid
from kvsuite.models.images import ImagePixels

pytestmark = needs_library
#: three sequences of 256 cells
PLAN = {"pool_blocks": 3 * 16 + 8, "max_model_len": 60, "max_num_seqs": 4, "step_tokens": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamacppSession]:
    found = widened_session(tmp_path_factory.mktemp("cache"))
    yield found
    found.close()


def loaded(*, policy: str | None = None, **changes: Any) -> Case:
    plan = ServingPlan(**(PLAN | changes)).to_dict()
    return case_of(
        suite="pipeline",
        policy=policy,
        params={SERVING_PARAM: plan, "kv_cache_dtype": "f32"},
        workload={"protocol": "load"},
    )


def requests(*arrivals: float) -> list[ServeRequest]:
    return [
        ServeRequest(random_tokens(20 + 5 * index, index), 6 + index, arrival_s=arrival)
        for index, arrival in enumerate(arrivals)
    ]


def counted(found: Served, asked: list[ServeRequest]) -> None:
    for one, request, tokens in zip(found.requests, asked, found.outputs, strict=True):
        assert one.admitted_s is not None
        assert one.arrival_s <= one.admitted_s < one.token_s[0]
        assert one.token_s == sorted(one.token_s)
        assert len(one.token_s) == len(tokens) == request.new_tokens
        assert one.stored_tokens == len(request.prompt) + request.new_tokens - 1
    assert all(step.prompt_tokens + step.decode_tokens <= 16 for step in found.steps)
    assert sum(step.prompt_tokens for step in found.steps) == sum(len(one.prompt) for one in asked)
    assert sum(step.decode_tokens for step in found.steps) == sum(one.new_tokens - 1 for one in asked)
    assert max(step.running for step in found.steps) <= 3
    assert max(step.used_blocks for step in found.steps) <= 3 * 16


@pytest.mark.parametrize("prompts_first", [True, False], ids=["prompts first", "chunks beside decoding"])
def test_five_requests_share_three_sequences(tiny: LlamacppSession, prompts_first: bool) -> None:
    tiny.prepare(loaded(prompts_first=prompts_first))
    assert isinstance(tiny, ServesUnderLoad)
    assert (tiny.effective["num_blocks"], tiny.effective["sequences"]) == (3 * 16, 3)
    asked = requests(0.0, 0.0, 0.0, 0.0, 0.0)
    found = tiny.serve_under_load(asked)
    counted(found, asked)
    assert (max(step.running for step in found.steps), max(step.waiting for step in found.steps)) == (3, 2)
    mixed = [step for step in found.steps if step.prompt_tokens and step.decode_tokens]
    assert bool(mixed) is not prompts_first
    # another request in the same cells leaves nothing behind
    tiny.prepare(case_of(params={"kv_cache_dtype": "f32"}))
    assert found.outputs == [tiny.serve([ServeRequest(one.prompt, one.new_tokens)]).outputs[0] for one in asked]


def test_requests_come_at_their_times_or_as_another_is_over(tiny: LlamacppSession) -> None:
    tiny.prepare(loaded())
    asked = requests(0.4, 0.0, 0.2)
    found = tiny.serve_under_load(asked)
    counted(found, asked)
    assert [one.arrival_s for one in found.requests] == [0.4, 0.0, 0.2]
    asked = requests(0.0, 0.0, 0.0)
    closed = tiny.serve_under_load(asked, concurrency=1)
    counted(closed, asked)
    assert max(step.running for step in closed.steps) == 1
    for before, one in zip(closed.requests, closed.requests[1:], strict=False):
        assert max(before.token_s) <= one.arrival_s
    with pytest.raises(ValueError, match="concurrency=2"):
        tiny.serve_under_load(requests(0.0, 1.0), concurrency=2)


def test_what_it_cannot_serve_is_one_line(tiny: LlamacppSession) -> None:
    for case in (loaded(policy="streaming_llm"), loaded(lanes=2)):
        with pytest.raises(CaseInvalid, match="baseline, and chunked without compression; use --kv-engine=nano"):
            LlamacppEngine().refuse(case)
    with pytest.raises(
        CaseInvalid, match=r"^--kv-pool-blocks=15: 240 tokens, and a sequence of llama.cpp has 256 cells"
    ):
        tiny.prepare(loaded(pool_blocks=15))
    tiny.prepare(loaded(prefix_caching=True))
    assert tiny.inert["prefix_caching"] == "sequences share no cells here"
    with pytest.raises(CaseInvalid, match="takes no forced output"):
        tiny.serve_under_load([ServeRequest([1, 2], 1, forced=[3])])
    with pytest.raises(CaseInvalid, match="engine llamacpp takes text alone, no images"):
        tiny.serve_under_load([ServeRequest([1, 2], 1, images=(ImagePixels(np.zeros((3, 28, 28))),))])
    with pytest.raises(CaseInvalid, match="longer than the 60 of the plan"):
        tiny.serve_under_load([ServeRequest([1] * 60, 1)])
    tiny.prepare(case_of())
    assert "prefix_caching" not in tiny.inert
    with pytest.raises(CaseInvalid, match="cases that have a plan"):
        tiny.serve_under_load(requests(0.0))
