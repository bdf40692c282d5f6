"""A serving plan goes through a case's JSON and back, and refuses what contradicts itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.case import Case, canonical_json
from kvsuite.engines.serving_plan import CONTROLLERS, SERVING_PARAM, STAGES, ServingPlan
from kvsuite.errors import UserError

LEAST: dict[str, Any] = {"pool_blocks": 4, "max_model_len": 32, "max_num_seqs": 2, "step_tokens": 16}


def case(params: dict[str, Any]) -> Case:
    return Case("pipeline", "nano", "smollm2", "one", "cpu", "float32", params=params)


@st.composite
def plans(draw: st.DrawFn) -> ServingPlan:
    size = st.integers(1, 10**9)
    sequences = draw(st.integers(1, 512))
    lanes = draw(st.sampled_from((1, 2)))
    stage = draw(st.sampled_from(STAGES))
    controller = draw(st.sampled_from((None, *CONTROLLERS))) if lanes == 2 else None
    paced = stage != "none" and controller is None
    return ServingPlan(
        **{draw(st.sampled_from(("pool_blocks", "pool_bytes"))): draw(size)},
        max_model_len=draw(size),
        max_num_seqs=sequences,
        step_tokens=draw(st.integers(sequences, 10**6)),
        prompts_first=lanes == 2 or draw(st.booleans()),
        prefix_caching=draw(st.booleans()),
        stage=stage,
        lanes=lanes,
        controller=controller,
        layers_per_step=draw(st.none() | st.integers(1, 8)) if paced else None,
    )


@given(plan=plans())
def test_a_plan_comes_out_of_the_json_of_its_case_as_it_went_in(plan: ServingPlan) -> None:
    params = json.loads(canonical_json({SERVING_PARAM: plan.to_dict()}))
    assert ServingPlan.of(case(params)) == plan


def test_a_case_without_a_plan_has_none() -> None:
    assert ServingPlan.of(case({"context": 40})) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pool_bytes": 10}, "one of the two"),
        ({"pool_blocks": None}, "one of the two"),
        ({"pool_blocks": 0}, "pool_blocks=0 must be a whole number of at least 1"),
        ({"max_model_len": True}, "max_model_len=True must be a whole number"),
        ({"max_num_seqs": 17}, "step_tokens=16 is less than max_num_seqs=17"),
        ({"stage": "later"}, "stage=later; use none, sync, async"),
        ({"lanes": 3}, "lanes=3; use 1, 2"),
        ({"controller": "best", "lanes": 2}, "controller=best; use null, auto, dual"),
        ({"controller": "auto"}, "use lanes=2"),
        ({"lanes": 2, "prompts_first": False}, "chunks beside decoding are lanes=1"),
        ({"layers_per_step": 0}, "layers_per_step=0 must be a whole number"),
        ({"layers_per_step": 4}, "layers_per_step=4: nothing is compressed"),
        ({"layers_per_step": 4, "stage": "async", "controller": "auto", "lanes": 2}, "4: a controller chooses it"),
        ({"blocks": 3}, "unknown blocks"),
    ],
)
def test_what_contradicts_itself_is_refused_in_a_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        ServingPlan.of(case({SERVING_PARAM: LEAST | change}))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plan_without_its_sizes_names_them() -> None:
    with pytest.raises(UserError, match="max_num_seqs is missing"):
        ServingPlan.of(case({SERVING_PARAM: {name: LEAST[name] for name in LEAST if name != "max_num_seqs"}}))
    with pytest.raises(UserError, match="no object of a plan's fields"):
        ServingPlan.of(case({SERVING_PARAM: 3}))
