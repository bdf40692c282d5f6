"""Options to cases of the design-space suite: which space, which ids, which prompts, and what is refused or invalid."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.memory_model.design_point import OFF, DesignPoint
from kvsuite.options.resolve import default_options
from kvsuite.suites.dse.cases import DSE, PARAMS, SERVING, design_space, dse_cases, judge, point_of
from kvsuite.suites.registry import cases_of


def cases(**options: str) -> list[Any]:
    return dse_cases(default_options(**({"device": "cpu"} | options)))


def test_the_default_is_the_small_space_in_two_formats() -> None:
    found = cases()
    assert [case.id for case in found[:2]] == [
        "nano-none-ctx512-pc128-bs01-swoff-sink0",
        "nano-none-ctx1024-pc128-bs01-swoff-sink0",
    ]
    assert [case.quantization for case in found] == [None] * 6 + ["q4f16_1"] * 6
    assert [case.dtype for case in found] == ["float32"] * 6 + ["float16"] * 6
    assert {(case.suite, case.engine, case.policy) for case in found} == {(DSE, "nano", None)}
    assert cases_of(DSE, default_options(device="cpu")) == found


def test_a_case_says_all_that_decides_what_is_measured() -> None:
    (case,) = cases(
        space="ctx=1024;chunk=256;batch=3;window=128;sink=8;quant=q0f16", prompt_share="0.3", max_new_tokens="7",
        prefix_caching="true", corpus="pydoc", eval_tokens="99",
    )  # fmt: skip
    assert case.params == {"context": 1024, "prefill_chunk": 256, "batch": 3, "window": 128, "sink": 8}
    assert case.workload == {
        "protocol": SERVING, "prompt_tokens": 307, "max_new_tokens": 7, "batch": 3, "prefix_caching": True,
        "corpus": "pydoc", "num_samples": 1, "eval_tokens": 99,
    }  # fmt: skip
    assert case.id == "nano-q0f16-ctx1024-pc256-bs03-sw128-sink8"
    assert point_of(case) == DesignPoint("q0f16", 1024, 256, 3, 128, 8)


def test_the_full_space_has_all_points_in_each_format() -> None:
    found = cases(dse="true", quantization="none,q4f16_1")
    # 36 x 4 of the outer product are sinks without a window: named, not dropped
    assert sum(not judge(case).broken for case in found) == 2 * 396
    assert len(found) == 2 * 540
    keys = {case.key(model_revision=None, dataset_revision=None) for case in found}
    assert len({case.id for case in found}) == len(keys) == len(found)
    # one format after the other, so that weights load once each
    assert [case.quantization for case in found] == [None] * 540 + ["q4f16_1"] * 540
    assert found == cases(space="full", quantization="none,q4f16_1")


@given(
    quantization=st.sampled_from(["none", "q4f16_1", "q0f32"]),
    context=st.integers(1, 10**6), chunk=st.integers(1, 10**6), batch=st.integers(1, 512),
    window=st.one_of(st.just(OFF), st.integers(1, 10**6)), sink=st.integers(0, 1000),
)  # fmt: skip
def test_a_point_comes_back_from_its_case(**values: Any) -> None:
    point = DesignPoint(
        values["quantization"], values["context"], values["chunk"], values["batch"], values["window"], values["sink"]
    )
    names = dict(zip(("ctx", "chunk", "batch", "window", "sink"), point.settings().values(), strict=True))
    text = ";".join(f"{name}={value}" for name, value in names.items())
    (case,) = cases(space=text, quantization=point.quantization)
    assert point_of(case) == point
    assert case.id == f"nano-{point.id}"
    assert list(case.params) == list(PARAMS.values())


def test_a_single_point_by_the_originals_options() -> None:
    (case,) = cases(
        context_window_size="2048", prefill_chunk_size="256", max_batch_size="2", sliding_window_size="512",
        attention_sink_size="4", quantization="q4f16_1",
    )  # fmt: skip
    assert case.name == "q4f16_1-ctx2048-pc256-bs02-sw512-sink4"
    # what is left out is as in --kv-space
    assert [case.name for case in cases(context_window_size="512", quantization="none")] == [
        "none-ctx512-pc512-bs01-swoff-sink0"
    ]
    assert [case.name for case in cases(sliding_window_size="-1", quantization="none")] == [
        "none-ctx4096-pc1024-bs01-swoff-sink0"
    ]


def test_the_originals_default_point_under_its_preset() -> None:
    found = cases(preset="original", quantization="q4f16_1")
    assert [case.name for case in found] == ["q4f16_1-ctx8192-pc8192-bs04-swoff-sink0"]
    assert len(cases(preset="original", quantization="none", dse="true")) == 540
    assert len(cases(preset="original", quantization="none", space="schemes")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "small", "max_batch_size": "2"}, "--kv-space and --kv-max-batch-size: a space and a single point"),
        ({"dse": "true", "sliding_window_size": "off"}, "--kv-dse and --kv-sliding-window-size: a space and a single"),
        ({"dse": "true", "space": "small"}, "--kv-space=small and --kv-dse: the latter is --kv-space=full"),
        ({"space": "big"}, "--kv-space=big: no such space; give schemes, small, full or axes"),
        ({"space": "batch=0"}, "--kv-space=batch=0: batch=0 must be a whole number of at least 1"),
        ({"space": "quant=q5"}, "--kv-space=quant=q5: unknown weight format q5; use none,"),
        ({"space": "quant=none", "quantization": "none"}, "quantization is given here and as an option of its own"),
        ({"context_window_size": "0"}, "--kv-context-window-size=0: must be at least 1"),
        ({"sliding_window_size": "none"}, "--kv-sliding-window-size=none: not a whole number"),
        ({"prompt_share": "1"}, "--kv-prompt-share=1: must lie between 0 and 1"),
    ],
)
def test_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        cases(**options)
    assert message in str(refused.value)


def test_full_may_be_said_twice() -> None:
    assert design_space(default_options(dse="true", space="full")).name == "full"


def test_invalid_points_are_cases_that_name_their_rule() -> None:
    space = "ctx=1024;chunk=512,2048;window=off,256;sink=0,4,64"
    found = cases(space=space, quantization="none", engine="mlc")
    assert len(found) == 12
    broken = {case.name: judge(case).broken for case in found}
    assert broken["none-ctx1024-pc512-bs01-swoff-sink0"] == ()
    assert broken["none-ctx1024-pc512-bs01-sw256-sink4"] == ()
    (chunk,) = broken["none-ctx1024-pc2048-bs01-swoff-sink0"]
    assert chunk == "breaks chunk-within-context: prefill_chunk_size=2048 is more than context_window_size=1024"
    assert "sink-needs-window" in broken["none-ctx1024-pc512-bs01-swoff-sink4"][0]
    assert "sink-within-eighth-of-window" in broken["none-ctx1024-pc512-bs01-sw256-sink64"][0]
    assert len(broken["none-ctx1024-pc2048-bs01-sw256-sink64"]) == 2
    # nano feeds several prompts in one step
    assert sum(any("chunk-" in rule for rule in judge(case).broken) for case in cases(space=space, engine="nano")) == 0


def test_the_trained_length_is_a_rule_for_real_models_and_a_flag_for_dummies() -> None:
    (case,) = cases(context_window_size="1024", quantization="none")
    assert judge(case, 1024) == judge(case) == judge(case, None, is_dummy=True)
    (reason,) = judge(case, 1023).broken
    assert "within-trained-length" in reason
    dummy = judge(case, 1023, is_dummy=True)
    assert dummy.broken == ()
    assert "random weights, so it runs" in dummy.flags[0]


@given(
    context=st.integers(1, 2000), new_tokens=st.integers(2, 100), share=st.floats(0.01, 0.99).map(lambda x: round(x, 2))
)
def test_prompt_and_output_fit_or_the_point_is_invalid(context: int, new_tokens: int, share: float) -> None:
    (case,) = cases(
        context_window_size=str(context), max_new_tokens=str(new_tokens), prompt_share=str(share), quantization="none"
    )
    prompt = case.workload["prompt_tokens"]
    assert prompt <= share * context < prompt + 1
    fits = prompt >= 1 and prompt + new_tokens < context
    assert any("room-for-output" in reason for reason in judge(case).broken) == (not fits)


def test_an_engine_by_name() -> None:
    assert {case.engine for case in cases(engine="hf")} == {"hf"}
    assert cases(engine="hf")[0].id.startswith("hf-none-ctx512")
