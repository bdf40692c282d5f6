"""The groups of the compression suite: the original's names and order, unique names, what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from compressor_weights import written
from hypothesis import given
from hypothesis import strategies as st

import kvsuite.compression as compression
from kvsuite.case import Case
from kvsuite.compression import RecentOnly, register_policy
from kvsuite.compression.kvpress.table import PRESSES
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.suites.compression.cases import compression_cases, method_name, unread_options
from kvsuite.suites.compression.suite import CompressionSuite
from kvsuite.suites.registry import cases_of, suite_names, usable_suites


def cases(**options: str) -> list[Case]:
    return compression_cases(default_options(**options))


def names(**options: str) -> list[str]:
    return [case.name for case in cases(**options)]


# systems.md 4.3

ORIGINAL_STREAMING = [
    "baseline", "recent_only_256", "recent_only_512", "recent_only_1024", "streaming_256", "streaming_512",
    "streaming_1024",
]  # fmt: skip


def test_original_streaming_run_has_seven_groups_in_code_order() -> None:
    assert names(preset="original", method="streaming_llm") == ORIGINAL_STREAMING


def test_original_l2_run_has_no_control_and_names_its_schedule() -> None:
    # the schedule is new in the name: it decides what the ratio means
    assert names(preset="original", method="l2_compress") == [
        "baseline", "l2_kr=0.8_every_token", "l2_kr=0.5_every_token", "l2_kr=0.3_every_token",
    ]  # fmt: skip


def test_original_fix_size_run() -> None:
    assert names(preset="original", method="fix_size_l2") == [
        "baseline", "recent_only_256", "recent_only_512",
        "fix256_keep_low_kr=0.8", "fix256_keep_low_kr=0.5", "fix256_keep_low_kr=0.3",
        "fix512_keep_low_kr=0.8", "fix512_keep_low_kr=0.5", "fix512_keep_low_kr=0.3",
    ]  # fmt: skip


def test_original_compare_all() -> None:
    found = cases(preset="original", compare_all="true")
    assert [case.name for case in found] == [
        "baseline", "l2_kr=0.8_every_token", "l2_kr=0.5_every_token", "fix512_keep_low_kr=0.5", "streaming_512",
        "streaming_1024",
    ]  # fmt: skip
    fixed = next(case for case in found if case.name.startswith("fix"))
    assert fixed.policy_params["keep_ratio"] == 0.5


def test_documented_calls_of_the_original() -> None:
    # ratio 1.0 is the baseline and is left out where there is one
    assert names(method="l2_compress", keep_ratios="1.0,0.8,0.5", l2_mode="every_token") == [
        "baseline", "l2_kr=0.8_every_token", "l2_kr=0.5_every_token",
    ]  # fmt: skip
    sizes = names(method="streaming_llm", start_size="4", recent_sizes="252,508,1020", num_samples="3")
    assert sizes == ORIGINAL_STREAMING


def test_groups_can_be_left_out() -> None:
    assert names(recent_sizes="28", no_baseline="true") == ["recent_only_32", "streaming_32"]
    assert names(recent_sizes="28", no_recent_only="true") == ["baseline", "streaming_32"]
    assert names(recent_sizes="28", no_baseline="true", no_recent_only="true") == ["streaming_32"]
    assert names(recent_sizes="28", method="recent_only", no_recent_only="true") == ["baseline", "recent_only_32"]


def test_policies_and_their_parameters() -> None:
    found = {case.name: case for case in cases(preset="original", method="streaming_llm,fix_size_l2,l2_compress")}
    common = {"positions": "original", "skip_layers": [0, 1]}
    assert found["baseline"].policy is None
    assert found["recent_only_256"].policy_params == {"window": 256} | common
    assert found["streaming_256"].policy_params == {"start_size": 4, "recent_size": 252} | common
    assert (
        found["fix256_keep_low_kr=0.8"].policy_params
        == {"size": 256, "keep_ratio": 0.8, "strategy": "keep_low"} | common
    )
    assert found["l2_kr=0.3_every_token"].policy_params == {
        "keep_ratio": 0.3, "prune_after": 100, "mode": "every_token",
    } | common  # fmt: skip
    assert len([name for name in found if name.startswith("recent_only")]) == 3, "one control per size, shared"
    budgets = {name: case.params["budget"] for name, case in found.items()}
    assert budgets["baseline"] is None
    assert (budgets["streaming_256"], budgets["recent_only_1024"], budgets["fix512_keep_low_kr=0.5"]) == (
        256,
        1024,
        512,
    )


def test_a_factor_is_a_parameter_of_any_policy_and_takes_the_place_of_its_sizes() -> None:
    found = cases(
        method="snapkv(factor=[2,5]),streaming_llm(factor=5),l2_compress(factor=2.5,rounding=kvpress_compat)",
        no_baseline="true", keep_ratios="0.3,0.4",
    )  # fmt: skip
    common = {"positions": "original", "skip_layers": []}
    assert {case.name: case.policy_params for case in found} == {
        "snapkv_factor=2": {"window": 64, "kernel": 5, "factor": 2.0} | common,
        "snapkv_factor=5": {"window": 64, "kernel": 5, "factor": 5.0} | common,
        "streaming_llm_factor=5": {"start_size": 4, "factor": 5.0} | common,
        "l2_compress_factor=2.5_rounding=kvpress_compat": {"factor": 2.5, "rounding": "kvpress_compat"} | common,
    }
    assert {case.workload["protocol"] for case in found} == {"prefix-continuation"}
    given = default_options(method="snapkv(factor=2)", keep_ratios="0.3", no_baseline="true")
    assert unread_options(given) == ["--kv-keep-ratios"]


def test_a_random_strategy_is_seeded() -> None:
    low, random = cases(
        method="fix_size_l2", strategies="keep_low,random", keep_ratios="0.5", fix_kv_sizes="32", seed="7", no_baseline="true",
        no_recent_only="true",
    )  # fmt: skip
    assert random.policy_params["seed"] == 7
    assert "seed" not in low.policy_params


def test_ratios_that_one_decimal_would_merge_are_two_groups() -> None:
    found = names(method="l2_compress,fix_size_l2,kvpress:SnapKV", keep_ratios="0.25,0.24", fix_kv_sizes="32")
    assert len(found) == len(set(found))
    for name in ("l2_kr={}_single_shot", "fix32_keep_low_kr={}", "SnapKV_kr={}"):
        assert {name.format("0.25"), name.format("0.24")} <= set(found)


def test_keeping_everything_is_the_baseline() -> None:
    assert names(method="l2_compress,kvpress:SnapKV", keep_ratios="1.0") == ["baseline"]
    assert names(method="l2_compress,kvpress:SnapKV", keep_ratios="1.0", no_baseline="true") == [
        "l2_kr=1.0_single_shot", "SnapKV_kr=1.0",
    ]  # fmt: skip
    # of fix_size_l2 the ratio is the protected part, and all of it protected is a method of its own
    assert "fix32_keep_low_kr=1.0" in names(method="fix_size_l2", keep_ratios="1.0", fix_kv_sizes="32")


def test_positions_are_in_name_and_identity() -> None:
    both = {case.name: case for case in cases(positions="both", recent_sizes="28")}
    assert list(both) == [
        "baseline",
        "recent_only_32",
        "streaming_32",
        "recent_only_32_poscache",
        "streaming_32_poscache",
    ]
    assert both["streaming_32"].policy_params["positions"] == "original"
    assert both["streaming_32_poscache"].policy_params["positions"] == "cache"
    keys = {case.key(model_revision="r", dataset_revision="d") for case in both.values()}
    assert len(keys) == 5
    assert names(positions="cache", recent_sizes="28") == [
        "baseline",
        "recent_only_32_poscache",
        "streaming_32_poscache",
    ]


def test_presses_by_any_spelling() -> None:
    for spelling in ("kvpress:SnapKV", "kvpress:snapkv", "kvpress:SnapKVPress"):
        found = cases(method=spelling, keep_ratios="0.5")
        assert [case.name for case in found] == ["baseline", "SnapKV_kr=0.5"]
        assert found[1].policy == "kvpress:SnapKV"
        assert found[1].policy_params == {"keep_ratio": 0.5}


def test_a_press_without_a_ratio_runs_once() -> None:
    assert names(method="kvpress:DMS", keep_ratios="0.8,0.5") == ["baseline", "DMS"]


@pytest.mark.parametrize("press", PRESSES)
def test_every_press_gives_cases(press: str) -> None:
    found = cases(method=f"kvpress:{press}", keep_ratios="0.5")
    assert len(found) == 2
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", found[1].id)


def test_one_protocol_for_all_groups() -> None:
    def protocols(**options: str) -> set[str]:
        return {case.workload["protocol"] for case in cases(**options)}

    assert protocols() == {"streaming-decode"}
    assert protocols(method="streaming_llm,kvpress:SnapKV") == {"prefix-continuation"}
    assert protocols(protocol="prefix-continuation") == {"prefix-continuation"}


def test_workload_is_what_the_options_say() -> None:
    case = cases(
        corpus="pydoc", num_samples="3", max_tokens="300", prompt_tokens="50", max_new_tokens="20", device="cuda",
        model="dummy:tiny",
    )[0]  # fmt: skip
    assert case.workload == {
        "protocol": "streaming-decode", "corpus": "pydoc", "num_samples": 3, "max_tokens": 300, "prompt_tokens": 50,
        "max_new_tokens": 20, "batch": 1,
    }  # fmt: skip
    assert (case.suite, case.engine, case.model, case.device, case.dtype) == (
        "compression", "hf", "dummy:tiny", "cuda:0", "checkpoint",
    )  # fmt: skip
    assert cases(device="cpu")[0].dtype == "float32"
    assert cases(device="cpu", dtype="bf16")[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nope"}, "--kv-method=nope: unknown method; known: .*recent_only, .*streaming_llm, .*kvpress:<Name>$"),
        ({"method": "SnapKV"}, r"did you mean kvpress:SnapKV\?$"),
        ({"method": "streamingllm"}, r"did you mean streaming_llm\?$"),
        ({"method": "snap-kv"}, r"did you mean snapkv\?$"),
        ({"method": "H2O"}, r"did you mean h2o\?$"),
        ({"method": "kvpress:nope"}, "--kv-method=kvpress:nope: unknown press"),
        ({"method": "head_aware"}, "--kv-method=head_aware: not part of kvsuite; use kvpress:AdaKV"),
        ({"method": "h2o_l2"}, "--kv-method=h2o_l2: not part of kvsuite; use fix_size_l2"),
        ({"method": "snapkv_lite"}, "--kv-method=snapkv_lite: not part of kvsuite; use kvpress:SnapKV"),
        ({"method": "pyramid_kv"}, "--kv-method=pyramid_kv: not part of kvsuite; use kvpress:PyramidKV"),
        ({"method": "adaptive_l2"}, "--kv-method=adaptive_l2: not part of kvsuite; use fix_size_l2"),
        ({"start_size": "29", "recent_sizes": "28"}, "--kv-start-size=29: more sinks than recent tokens"),
        ({"method": "kvpress:SnapKV", "positions": "both"}, "^$"),
        ({"method": "kvpress:SnapKV", "positions": "cache"}, "use kvpress:KeyRerotation, or positions=original"),
        ({"method": "kvpress:SnapKV", "skip_layers": "0"}, "--kv-skip-layers: kvpress:SnapKV treats all layers"),
        ({"method": "kvpress:SnapKV", "protocol": "streaming-decode"}, "use prefix-continuation"),
        ({"method": "kvpress:SnapKV,kvpress:snapkv"}, "the groups SnapKV_kr=0.3, .* occur twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, str], message: str) -> None:
    if message == "^$":
        # a press decides on positions itself, the policies beside it come twice
        assert names(**options, keep_ratios="0.5") == ["baseline", "SnapKV_kr=0.5"]
        return
    with pytest.raises(UserError, match=message):
        cases(**options)


def test_as_many_sinks_as_recent_tokens_are_allowed() -> None:
    assert "streaming_8" in names(start_size="4", recent_sizes="4")
    assert "streaming_4" in names(start_size="0", recent_sizes="4")
    # only streaming_llm has sinks
    assert names(method="l2_compress", start_size="29", recent_sizes="28", keep_ratios="0.5")[1:] == [
        "l2_kr=0.5_single_shot"
    ]


@pytest.fixture
def registered() -> Iterator[str]:
    @register_policy
    class Mine(RecentOnly):
        name = "mine"

        def __init__(self, *, window: int = 17, **common: object) -> None:
            super().__init__(window=window, **common)

    yield "mine"
    del compression._POLICIES["mine"]


def test_a_registered_policy_is_a_group_with_its_own_defaults(registered: str) -> None:
    found = cases(method=f"streaming_llm,{registered}", recent_sizes="28", skip_layers="1")
    assert [case.name for case in found] == ["baseline", "recent_only_32", "streaming_32", "mine"]
    assert found[-1].policy == "mine"
    assert found[-1].policy_params == {"window": 17, "positions": "original", "skip_layers": [1]}
    assert method_name(default_options(method=registered)) == "mine"


def test_a_policy_is_registered_once(registered: str) -> None:
    with pytest.raises(ValueError, match="policy 'mine' is already registered"):
        register_policy(type("Other", (RecentOnly,), {"name": "mine"}))


def test_method_names_of_run_folders() -> None:
    assert method_name(default_options()) == "streaming_llm"
    assert method_name(default_options(method="kvpress:SnapKV")) == "kvpress_snapkv"
    assert method_name(default_options(method="recent_only,l2_compress")) == "compare_all"
    assert method_name(default_options(compare_all="true")) == "compare_all"


def test_options_that_nothing_reads_are_named() -> None:
    assert unread_options(default_options(strategies="random", prune_after="3")) == [
        "--kv-prune-after",
        "--kv-strategies",
    ]
    assert unread_options(default_options(method="fix_size_l2", strategies="random", keep_ratios="0.5")) == []
    assert unread_options(default_options(method="kvpress:SnapKV", keep_ratios="0.5", start_size="2")) == [
        "--kv-start-size"
    ]
    assert unread_options(default_options(compare_all="true", method="recent_only")) == ["--kv-method"]
    assert unread_options(default_options()) == []


def test_registry() -> None:
    assert suite_names() == ["compression", "dse", "perplexity", "pipeline", "retrieval", "sensitivity"]
    # tables stand in this order
    suites = usable_suites()
    assert [suite.name for suite in suites] == [
        "compression",
        "perplexity",
        "dse",
        "pipeline",
        "retrieval",
        "sensitivity",
    ]
    # other suites name their folders after themselves
    assert [suite.run_name(default_options()) for suite in suites] == [
        "streaming_llm",
        "perplexity",
        "dse",
        "pipeline",
        "retrieval",
        "sensitivity",
    ]
    assert cases_of("compression", default_options()) == cases()
    with pytest.raises(
        UserError,
        match=r"kv_suite\('nope'\): unknown suite; known: compression, dse, perplexity, pipeline, retrieval, sensitivity",
    ):
        cases_of("nope", default_options())
    empty = default_options(method="l2_compress", no_baseline="true", keep_ratios="0.5", compare_all="false")
    assert len(cases_of("compression", empty)) == 1


METHODS = st.lists(
    st.sampled_from(["streaming_llm", "recent_only", "fix_size_l2", "l2_compress", "kvpress:SnapKV", "kvpress:DMS"]),
    min_size=1,
    unique=True,
)


@given(
    methods=METHODS,
    recents=st.lists(st.integers(4, 2000), min_size=1, max_size=4, unique=True),
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=4, unique=True),
    ratios=st.lists(st.floats(0.001, 1), min_size=1, max_size=4, unique=True),
    positions=st.sampled_from(["original", "both"]),
    baseline=st.booleans(),
)
def test_any_space_has_unique_names_ids_and_keys(
    methods: list[str], recents: list[int], sizes: list[int], ratios: list[float], positions: str, baseline: bool
) -> None:
    found = cases(
        method=",".join(methods), recent_sizes=",".join(map(str, recents)), fix_kv_sizes=",".join(map(str, sizes)),
        keep_ratios=",".join(map(repr, ratios)), positions=positions, no_baseline=str(not baseline).lower(),
    )  # fmt: skip
    assert len({case.name for case in found}) == len(found)
    assert len({case.id for case in found}) == len(found)
    assert len({case.key(model_revision=None, dataset_revision=None) for case in found}) == len(found)
    assert all(re.fullmatch(r"hf-[A-Za-z0-9_.-]+", case.id) for case in found)
    assert [case.name for case in found if case.policy is None] == ["baseline"] * baseline
    assert found == cases(
        method=",".join(methods), recent_sizes=",".join(map(str, recents)), fix_kv_sizes=",".join(map(str, sizes)),
        keep_ratios=",".join(map(repr, ratios)), positions=positions, no_baseline=str(not baseline).lower(),
    ), "the same options give the same cases on every worker"  # fmt: skip


@pytest.mark.parametrize("suite", ["compression", "perplexity", "dse"])
def test_an_attention_function_is_in_the_key_where_it_was_chosen_and_only_there(suite: str) -> None:
    usual, auto, chosen = (
        cases_of(suite, default_options(**given)) for given in ({}, {"attention": "auto"}, {"attention": "eager"})
    )
    assert [case.to_dict() for case in usual] == [case.to_dict() for case in auto]
    assert not any("attention" in case.params for case in auto)
    assert {case.params["attention"] for case in chosen} == {"eager"}
    assert [case.id for case in usual] == [case.id for case in chosen]
    keys = [{case.key(model_revision=None, dataset_revision=None) for case in those} for those in (usual, chosen)]
    assert not keys[0] & keys[1]


@pytest.fixture
def theirs() -> Iterator[None]:
    """Policies of somebody else: one that names its variants, one that does not, one that fails."""

    class Named(RecentOnly):
        name = "named"

        def label(self, chosen: Mapping[str, Any] | None) -> str:
            return f"last{self.window}"

    class Plain(RecentOnly):
        name = "plain"

    class Failing(RecentOnly):
        name = "failing"

        def label(self, chosen: Mapping[str, Any] | None) -> str:
            raise LookupError("no name\nfor it")

    for policy in (Named, Plain, Failing):
        register_policy(policy)
    yield
    for name in ("named", "plain", "failing"):
        compression._POLICIES.pop(name)


@pytest.mark.usefixtures("theirs")
def test_a_policy_names_its_variants() -> None:
    assert names(method="named(window=[3,4]),plain(window=5)", positions="both")[1:] == [
        "last3", "last4", "plain_window=5", "last3_poscache", "last4_poscache", "plain_window=5_poscache",
    ]  # fmt: skip
    assert {case.params["group"] for case in cases(method="named(window=3)")[1:]} == {"policy"}
    # two variants of one name are not told apart
    with pytest.raises(UserError, match=r"--kv-method: the groups last3 occur twice"):
        names(method="named(window=3),named(window=[3,4])")


@pytest.mark.usefixtures("theirs")
def test_a_policy_that_fails_is_one_line_with_object_and_mend() -> None:
    with pytest.raises(UserError) as caught:
        names(method="failing(window=3)")
    assert re.fullmatch(
        r"--kv-method=failing: \S+:\S*Failing cannot be made of \{'window': 3\} \(LookupError: no name\); correct it, or give "
        r"other parameters",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ({}, 0),
        ({"cache_dtype": "int8,auto"}, 0),
        ({"cache_dtype": "int8,int4"}, 1),
        ({"no_baseline": "true"}, 1),
        ({"no_baseline": "true", "cache_dtype": "int8,auto"}, 1),
        ({"no_baseline": "true", "quantization": "none,fake_q3"}, 2),
        ({"no_baseline": "true", "divergence": "false"}, 0),
    ],
)
def test_the_reference_is_a_pass_of_a_loaded_model_where_no_case_is_it(given: dict[str, str], passes: int) -> None:
    options = default_options(max_tokens="100", num_samples="2", **given)
    found = compression_cases(options)
    without = default_options(max_tokens="100", num_samples="2", **given | {"divergence": "false"})
    steps = [sum(CompressionSuite().cost(case, asked).steps for case in found) for asked in (options, without)]
    assert steps[0] - steps[1] == 200 * passes


def test_the_compressor_takes_its_weights_from_the_option(tmp_path: Path) -> None:
    path, own = written(tmp_path / "a.pth"), written(tmp_path / "b.pth", factor=4)
    options = default_options(
        method=f"mean_pool,mlp,mlp_residual(factor=[4,5],weights={own})", compressor_path=path, no_baseline="true"
    )
    found = {case.name: case.policy_params for case in compression_cases(options)}
    assert list(found) == ["mean_pool", "mlp", "mlp_residual_factor=4_weights=b", "mlp_residual_factor=5_weights=b"]
    assert [one.get("weights") for one in found.values()] == [None, path, own, own]
    assert found["mlp"]["digest"] != found["mlp_residual_factor=4_weights=b"]["digest"]
    assert {case.workload["protocol"] for case in compression_cases(options)} == {"prefix-continuation"}
    assert unread_options(options) == []
    assert unread_options(default_options(compressor_path=path)) == ["--kv-compressor-path"]
    with pytest.raises(UserError, match="--kv-method=mlp: has no weights; give --kv-compressor-path=FILE"):
        compression_cases(default_options(method="mlp"))
    with pytest.raises(UserError, match=r"positions=cache.*use --kv-positions=original"):
        compression_cases(default_options(method="mean_pool", positions="both"))
