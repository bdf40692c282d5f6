"""Requests under load on engine vllm, on recorded answers of a real one: the plan's pool, its steps, and what is told of each.

What this cannot prove: that vLLM still answers so, and that its times are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_sessions import case, load, save_small

from kvsuite.case import Case
from kvsuite.engines.capabilities import ServesUnderLoad
from kvsuite.engines.results import Served, ServeRequest
from kvsuite.engines.serving_plan import SERVING_PARAM, ServingPlan
from kvsuite.engines.vllm.session import VllmSession
from kvsuite.errors import CaseInvalid

#: 8 blocks of 32 tokens, where five requests of 48 tokens take two each
PLAN = {"pool_blocks": 16, "max_model_len": 64, "max_num_seqs": 5, "step_tokens": 24, "prompts_first": False}


def loaded(model: Path, **changes: Any) -> Case:
    plan = ServingPlan(**(PLAN | changes)).to_dict()
    workload = {"protocol": "load", "prompt_tokens": 28, "max_new_tokens": 20}
    return case(suite="pipeline", model=str(model), dtype="float32", params={SERVING_PARAM: plan}, workload=workload)


def requests(*arrivals: float) -> list[ServeRequest]:
    return [
        ServeRequest([(7 * at + 31 * index) % 512 for at in range(28)], 20, arrival_s=arrival)
        for index, arrival in enumerate(arrivals)
    ]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSession]:
    model = save_small(tmp_path_factory.mktemp("model"))
    found = load(loaded(model))
    yield found
    found.close()


def counted(found: Served, *, step_tokens: int) -> None:
    """What must hold of every run."""
    for one, tokens in zip(found.requests, found.outputs, strict=True):
        assert one.admitted_s is not None
        assert one.arrival_s <= one.admitted_s < one.token_s[0]
        assert one.token_s == sorted(one.token_s)
        assert len(one.token_s) == len(tokens) == 20
        assert one.stored_tokens == 28 + 19
    assert all(step.prompt_tokens + step.decode_tokens <= step_tokens for step in found.steps)
    assert [step.start_s for step in found.steps] == sorted(step.start_s for step in found.steps)
    assert max(step.used_blocks for step in found.steps) <= 8
    assert sum(step.prompt_tokens for step in found.steps) == found.counts["computed_prefill_tokens"]
    assert found.counts["computed_prefill_tokens"] == sum(one.computed_prompt_tokens or 0 for one in found.requests)
    assert found.counts["preemptions"] == sum(one.preemptions or 0 for one in found.requests)


def test_requests_come_at_their_times_and_share_the_plans_pool(session: VllmSession) -> None:
    assert isinstance(session, ServesUnderLoad)
    found = session.serve_under_load(requests(0.0, 0.01, 0.02, 30.0, 30.0))
    counted(found, step_tokens=24)
    assert [one.arrival_s for one in found.requests] == [0.0, 0.01, 0.02, 30.0, 30.0]
    assert (session.effective["num_blocks"], session.effective["block_size"]) == (8 + 1, 32)
    # nothing is done before the last two come
    assert max(found.requests[2].token_s) < 30.0 <= min(found.requests[3].token_s)
    # prompts of 28 in steps of 24
    assert max(step.prompt_tokens for step in found.steps) > 4


def test_a_pool_that_is_full_takes_blocks_back_and_says_of_whom(session: VllmSession) -> None:
    found = session.serve_under_load(requests(0.0, 0.0, 0.0, 0.0, 0.0))
    counted(found, step_tokens=24)
    assert max(step.used_blocks for step in found.steps) == 8
    # the fifth waits, or one is computed again
    taken = [one for one in found.requests if one.preemptions]
    assert taken or max(step.waiting for step in found.steps)
    for one in taken:
        assert (one.computed_prompt_tokens or 0) > 28


def test_in_a_closed_loop_one_comes_when_another_is_over(session: VllmSession) -> None:
    found = session.serve_under_load(requests(0.0, 0.0, 0.0), concurrency=1)
    counted(found, step_tokens=24)
    for before, one in zip(found.requests, found.requests[1:], strict=False):
        assert max(before.token_s) <= one.arrival_s
    assert max(step.running for step in found.steps) == 1
    with pytest.raises(ValueError, match="concurrency=2"):
        session.serve_under_load(requests(0.0, 1.0), concurrency=2)
    with pytest.raises(CaseInvalid, match="takes no forced output"):
        session.serve_under_load([ServeRequest([1, 2], 1, forced=[3])])


def test_what_a_plan_asks_and_vllm_has_not_is_one_line(session: VllmSession, tmp_path: Path) -> None:
    model = save_small(tmp_path)
    for changes, said in (
        (
            {"pool_blocks": 3},
            r"--kv-pool-blocks=3: 1 of vLLM's blocks of 32 tokens are fewer than the 2 of one request",
        ),
        ({"lanes": 2, "prompts_first": True}, "engine vllm has no compression stage and one lane"),
    ):
        with pytest.raises(CaseInvalid, match=said):
            session.prepare(loaded(model, **changes))
    session.prepare(loaded(model, prompts_first=True))
    assert "beside decoding requests" in session.inert["prompts_first"]
    session.prepare(loaded(model))
    assert "prompts_first" not in session.inert
