"""A serving plan on the nano engine: the pool, steps and order that it names, and what the engine cannot do is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hf_sessions import VOCAB, case, random_tokens

from kvsuite.case import Case
from kvsuite.compression import get_policy
from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.nano.memory import waiting_bytes
from kvsuite.engines.nano.session import NanoSession
from kvsuite.engines.results import ServeRequest
from kvsuite.engines.serving_plan import SERVING_PARAM, ServingPlan
from kvsuite.errors import CaseInvalid, CaseSkipped
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.sampling import SamplingParameters

PLAN: dict[str, Any] = {"pool_blocks": 8, "max_model_len": 64, "max_num_seqs": 4, "step_tokens": 32}


def planned(policy: str | None = None, params: dict[str, Any] | None = None, **plan: Any) -> Case:
    chosen = ServingPlan(**{**PLAN, **({"pool_blocks": None} if "pool_bytes" in plan else {}), **plan})
    kept = {} if policy is None else get_policy(policy, **(params or {})).to_dict()
    return Case(
        **(
            case().to_dict()
            | {
                "engine": "nano",
                "policy": policy,
                "policy_params": kept,
                "workload": {"protocol": "load", "prompt_tokens": 40, "max_new_tokens": 20},
                "params": {SERVING_PARAM: chosen.to_dict()},
            }
        )
    )


@functools.cache
def session() -> NanoSession:
    return NanoSession(planned(), EngineSettings(threads=1))


def requests(count: int = 4) -> list[ServeRequest]:
    return [ServeRequest(random_tokens(40, seed), 20) for seed in range(count)]


def test_the_pool_is_the_plans_for_every_variant() -> None:
    """Not what happens to be free, and the same whether something is compressed or not (flaw 8)."""
    found = []
    for of in (planned(), planned(prompts_first=False), planned("recent_only", {"window": 8}, stage="sync")):
        session().prepare(of)
        found.append(session().effective["num_blocks"])
        assert session().effective["max_num_seqs"] == 4
    assert found == [8, 8, 8]
    block = session().full_kv_bytes(16)
    session().prepare(planned(pool_bytes=6 * block))
    # one of them is the scratch block, which is no sequence's
    assert session().effective["num_blocks"] == 5


def test_a_pool_for_two_takes_more_steps_and_gives_the_same_tokens() -> None:
    session().prepare(planned())
    served = session().serve(requests())
    assert [len(output) for output in served.outputs] == [20] * 4
    session().prepare(planned(pool_blocks=16))
    roomy = session().serve(requests())
    assert roomy.counts["steps"] < served.counts["steps"]
    assert roomy.outputs == served.outputs


def test_the_policy_of_the_case_acts_beside_its_plan() -> None:
    session().prepare(planned("recent_only", {"window": 8}, stage="sync"))
    served = session().serve(requests(2))
    assert served.counts["evicted_tokens"] > 0
    session().prepare(planned())
    assert session().serve(requests(2)).counts["evicted_tokens"] == 0


@pytest.mark.parametrize(
    ("name", "own"), [("streaming_llm", {"start_size": 2}), ("snapkv", {"window": 4}), ("h2o", {})]
)
def test_a_prompt_is_compressed_by_a_factor_where_the_plan_says_and_the_tokens_are_the_same(
    name: str, own: dict[str, Any]
) -> None:
    found = {}
    for stage in ("sync", "async"):
        session().prepare(planned(name, {"factor": 5, **own}, stage=stage))
        served = session().serve(requests())
        assert session().effective["stage"] == stage
        assert session().effective["stepwise"] is False
        assert served.counts["evicted_tokens"] == 4 * (40 - 8)
        found[stage] = served.outputs
    assert found["async"] == found["sync"]
    session().prepare(planned())
    assert "stepwise" not in session().effective
    dense = session().serve(requests())
    session().prepare(planned(name, {"factor": 1, **own}, stage="async"))
    assert session().serve(requests()).outputs == dense.outputs


def test_what_acts_after_every_token_is_stepwise_and_has_no_place_beside_the_steps() -> None:
    session().prepare(planned("recent_only", {"window": 8}, stage="sync"))
    session().serve(requests(1))
    assert session().effective["stepwise"] is True
    with pytest.raises(CaseInvalid, match=r"policy recent_only: .* give the policy a factor"):
        session().prepare(planned("recent_only", {"window": 8}, stage="async"))


def test_chunks_of_prompts_share_steps_with_decoding_and_change_no_token() -> None:
    session().prepare(planned(pool_blocks=16, step_tokens=8, prompts_first=False))
    chunked = session().serve(requests())
    session().prepare(planned(pool_blocks=16, step_tokens=64))
    whole = session().serve(requests())
    assert chunked.outputs == whole.outputs
    assert chunked.counts["steps"] != whole.counts["steps"]


@pytest.mark.parametrize("policy", [None, "recent_only"])
def test_two_lanes_change_no_token_and_say_which_lane_a_step_was_of(policy: str | None) -> None:
    given = {} if policy is None else {"policy": policy, "params": {"factor": 2}, "stage": "async"}
    found = []
    for lanes in (1, 2):
        session().prepare(planned(**given, pool_blocks=9, lanes=lanes))
        found.append(session().serve_under_load(requests()))
        assert session().effective.get("lanes", 1) == lanes
        assert ("take turns" in session().inert.get("lanes", "")) == (lanes == 2)
    one, two = found
    assert two.outputs == one.outputs
    assert {step.lane for step in one.steps} == {"both"}
    fed = dict.fromkeys(("prompt", "decode"), (0, 0))
    for step in two.steps:
        prompts, decodes = fed[step.lane]
        fed[step.lane] = prompts + step.prompt_tokens, decodes + step.decode_tokens
    assert fed["prompt"][0] >= 4 * 40
    assert fed["prompt"][1] == fed["decode"][0] == 0
    assert fed["decode"][1] >= 4 * 19
    session().prepare(planned())
    assert "lanes" not in session().inert
    assert "lanes" not in session().effective


def test_identical_prompts_are_found_again_only_where_the_plan_says_so() -> None:
    same = [ServeRequest(random_tokens(40, 3), 4)] * 2
    for caching, hits in ((True, 32), (False, 0)):
        session().prepare(planned(pool_blocks=16, prefix_caching=caching, max_num_seqs=1))
        assert session().serve(same).counts["prefix_hit_tokens"] == hits


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"lanes": 2, "controller": "auto"}, "decides how prompts are compressed; give a policy"),
        ({"stage": "sync"}, "if and only if"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_under_its_name(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(CaseInvalid, match=said):
        session().prepare(planned(**plan))


def test_a_partition_that_cannot_be_had_skips_the_case_and_needs_two_lanes() -> None:
    parted = planned(lanes=2).to_dict() | {"partition": {"decode_sms": 64, "prompt_sms": 64}}
    with pytest.raises(CaseSkipped, match="needs a CUDA device, not cpu"):
        session().prepare(Case(**parted))
    assert session().partition["realised"] is None
    with pytest.raises(CaseInvalid, match="between two lanes, and this case has one"):
        session().prepare(Case(**(planned().to_dict() | {"partition": parted["partition"]})))


def test_a_policy_without_a_stage_is_refused() -> None:
    with pytest.raises(CaseInvalid, match="if and only if"):
        session().prepare(planned("recent_only", {"window": 8}))


def test_a_case_after_one_with_a_plan_has_none() -> None:
    session().prepare(planned())
    session().prepare(Case(**(case().to_dict() | {"engine": "nano"})))
    [output] = session().serve([ServeRequest(random_tokens(64, 1), 8)]).outputs
    assert len(output) == 8
    assert max(output) < VOCAB
    assert session().effective["num_blocks"] > 4


def test_layers_after_each_token_are_what_the_session_says_and_does() -> None:
    merged = {"policy": "mean_pool", "params": {"factor": 4}, "stage": "async", "pool_blocks": 16}
    session().prepare(planned(**merged))
    assert "layers_per_step" not in session().effective
    at_the_end = session().serve_under_load(requests())
    session().prepare(planned(**merged, layers_per_step=1))
    layers = len(session()._layers)
    assert session().effective["layers_per_step"] == 1
    assert session().effective["merged_after"] == layers
    later = session().serve_under_load(requests())
    for found in (at_the_end, later):
        assert [one.evicted_tokens for one in found.requests] == [30] * 4
        assert all(one.compress_s is not None for one in found.requests)
    assert later.outputs != at_the_end.outputs
    session().prepare(planned())
    dense = session().serve_under_load(requests())
    # the full prompt is read until all layers are merged
    assert [one[: layers + 1] for one in later.outputs] == [one[: layers + 1] for one in dense.outputs]
    with pytest.raises(CaseInvalid, match="layers_per_step=1: policy recent_only keeps tokens"):
        session().prepare(planned("recent_only", {"window": 8}, stage="sync", layers_per_step=1))


def test_what_waits_beside_the_pool_layer_by_layer_is_predicted() -> None:
    merged = {"policy": "mean_pool", "params": {"factor": 4}, "stage": "sync", "pool_blocks": 16}
    predicted = []
    for more in ({}, {"layers_per_step": 1}):
        session().prepare(planned(**merged, **more))
        predicted.append(session().memory(requests(2)).predicted["workspace_bytes"])
    runtime = session()._runtime(requests(2))
    for one in requests(2):
        runtime.add(Request(list(one.prompt), SamplingParameters(max_new_tokens=20, ignore_eos=True)))
    merging = {}
    while runtime.unfinished:
        runtime.step()
        merging |= {id(one): one for one in runtime.compression._merging.values()}
    assert len(merging) == 2
    made = [tensor for one in merging.values() for [pair] in one.begun for tensor in pair]
    waiting = predicted[1] - predicted[0]
    assert waiting == sum(tensor.nbytes for tensor in made) > 0
    # a controller decides anew for each prompt: what was decided of the one that was served counts, not the last word
    paced, served = (one.request for one in merging.values())
    runtime.compression.layers_per_step = None
    assert waiting_bytes(runtime, [paced, served], 4) == waiting
    at_its_end = runtime.add(
        Request(list(requests(1)[0].prompt), SamplingParameters(max_new_tokens=20, ignore_eos=True))
    )
    runtime.step()
    runtime.compression.layers_per_step = 1
    assert waiting_bytes(runtime, [paced, at_its_end], 4) == waiting / 2
    runtime.cancel(at_its_end)
