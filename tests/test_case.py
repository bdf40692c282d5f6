from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.case import Case, canonical_json, digest, id_token
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.record import RECORD_SCHEMA, Record, check_schema
from kvsuite.suites.compression.cases import compression_cases
from kvsuite.suites.compression.options import CompressionOptions

CASE = Case(
    suite="compression",
    engine="hf",
    model="smollm2",
    name="fix32_keep_low_kr=0.5",
    device="cuda:0",
    dtype="bfloat16",
    policy="fix_size_l2",
    policy_params={"size": 32, "keep_ratio": 0.5},
    workload={"protocol": "streaming-decode", "max_tokens": 257},
    params={"group": "fix_size"},
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def key(case: Case, model: str | None = "sha256:1", dataset: str | None = "sha256:2") -> str:
    return case.key(model_revision=model, dataset_revision=dataset)


def test_a_key_is_a_hash() -> None:
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", key(CASE))


def test_the_same_case_on_another_device_of_the_kind() -> None:
    assert key(CASE) == key(replace(CASE, device="cuda:3")) == key(replace(CASE, device="cuda"))


@given(data=st.data(), mapping=st.dictionaries(st.text(), JSON, max_size=6))
def test_the_order_of_a_mapping_does_not_matter(data: Any, mapping: dict[str, Any]) -> None:
    shuffled = dict(data.draw(st.permutations(list(mapping.items()))))
    one, other = (replace(CASE, policy_params=m, workload=m, params=m) for m in (mapping, shuffled))
    assert key(one) == key(other)
    assert hash(one) == hash(other)
    assert digest(mapping) == digest(shuffled)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"}, {"device": "cpu"}, {"model": "other"}, {"engine": "nano"}, {"suite": "dse"},
        {"name": "x"}, {"quantization": "q4f16_1"}, {"policy": "recent_only"}, {"policy_params": {"size": 33}},
        {"workload": {"protocol": "prefix-continuation"}}, {"params": {}}, {"partition": {"sms": 16}},
    ],
)  # fmt: skip
def test_whatever_decides_what_is_measured_changes_the_key(changes: dict[str, Any]) -> None:
    assert key(replace(CASE, **changes)) != key(CASE)


def test_weights_and_text_are_part_of_the_identity() -> None:
    keys = [
        key(CASE),
        key(CASE, model="sha256:9"),
        key(CASE, model=None),
        key(CASE, dataset="sha256:9"),
        key(CASE, dataset=None),
    ]
    assert len(set(keys)) == 5


def test_a_changed_mapping_of_the_caller_is_a_changed_case() -> None:
    row = CASE.to_dict()
    row["policy_params"]["size"] = 1
    assert CASE.policy_params["size"] == 32


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": math.nan}, [-math.inf]])
def test_canonical_json_refuses_what_json_does_not_have(value: Any) -> None:
    with pytest.raises(ValueError):
        canonical_json(value)


def test_canonical_json_refuses_other_types() -> None:
    with pytest.raises(TypeError):
        canonical_json({"a": {1, 2}})


def test_the_id_is_safe_for_k() -> None:
    assert CASE.id == "hf-fix32_keep_low_kr0.5"
    assert replace(CASE, name="kvpress:SnapKV kr=0.5").id == "hf-kvpress_SnapKV_kr0.5"


@given(name=st.text(max_size=30))
def test_an_id_has_only_letters_digits_and_three_marks(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.-]*", id_token(name))
    assert id_token(id_token(name)) == id_token(name)


def test_defect_09_ratios_of_two_decimals_have_their_own_names() -> None:
    options = default_options(method="fix_size_l2,l2_compress", keep_ratios="0.25,0.24", fix_kv_sizes="32")
    cases = compression_cases(options)
    names = [case.name for case in cases]
    assert {
        "fix32_keep_low_kr=0.25",
        "fix32_keep_low_kr=0.24",
        "l2_kr=0.25_single_shot",
        "l2_kr=0.24_single_shot",
    } <= set(names)
    assert len(set(names)) == len({case.id for case in cases}) == len({key(case) for case in cases}) == len(cases)
    with pytest.raises(UserError, match="names the same value twice"):
        default_options(keep_ratios="0.25,0.250")


def test_defect_09_names_are_unique_over_the_whole_cross_section() -> None:
    for options in (
        default_options(compare_all="true", positions="both"),
        default_options(preset="original", method="streaming_llm,recent_only,l2_compress,fix_size_l2", positions="both",
                        strategies="keep_low,keep_high,random"),
    ):  # fmt: skip
        cases = compression_cases(options)
        assert len({case.id for case in cases}) == len({key(case) for case in cases}) == len(cases)


def test_defect_10_no_layer_skipped_can_be_said() -> None:
    for text in ("none", "NONE"):
        assert default_options(skip_layers=text).of(CompressionOptions).skip_layers == ()
        assert all(
            not case.policy_params.get("skip_layers") for case in compression_cases(default_options(skip_layers=text))
        )
    # also where the preset's default is 0,1
    assert default_options(preset="original").of(CompressionOptions).skip_layers == (0, 1)
    assert default_options(preset="original", skip_layers="none").of(CompressionOptions).skip_layers == ()
    streaming = next(c for c in compression_cases(default_options(skip_layers="0,1")) if c.policy == "streaming_llm")
    assert streaming.policy_params["skip_layers"] == [0, 1]


def test_defect_04_l2_labels_show_the_mode() -> None:
    for mode, label in (("single_shot", "single_shot"), ("every_token", "every_token"), ("interval=16", "interval16")):
        cases = compression_cases(default_options(method="l2_compress", keep_ratios="0.5", l2_mode=mode))
        assert cases[-1].name == f"l2_kr=0.5_{label}"
        assert cases[-1].policy_params["mode"] == mode


def test_defect_11_sizes_are_refused_as_options() -> None:
    for name, value in (("recent_sizes", "0"), ("fix_kv_sizes", "0"), ("keep_ratios", "0"), ("max_new_tokens", "0")):
        with pytest.raises(UserError, match=f"--kv-{name.replace('_', '-')}=0"):
            default_options(**{name: value})


def test_a_record_row_holds_the_case() -> None:
    row = Record(case=CASE, id="test.py::test[x]").to_dict()
    assert (row["schema"], row["suite"], row["status"]) == (RECORD_SCHEMA, "compression", "ok")
    assert row["case"] == CASE.to_dict()
    assert row["memory"] == {"predicted": {}, "reported": {}, "measured": {}}
    # two records share nothing
    assert Record(case=CASE, id="").metrics is not Record(case=CASE, id="").metrics


def test_another_schema_is_refused() -> None:
    check_schema(RECORD_SCHEMA, RECORD_SCHEMA, "a.jsonl")
    with pytest.raises(
        UserError, match=r"a.jsonl: schema is 'kvsuite.record/9', this kvsuite reads 'kvsuite.record/1'"
    ):
        check_schema("kvsuite.record/9", RECORD_SCHEMA, "a.jsonl")
