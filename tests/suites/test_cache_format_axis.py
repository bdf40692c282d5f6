"""``--kv-cache-dtype`` is an axis of every suite, and ``auto`` is no part of a case: keys of old records stay."""

from __future__ import annotations

import pytest

from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.options.resolve import default_options
from kvsuite.suites.registry import suite_named

SUITES = ("compression", "perplexity", "dse")
COMMON = {"device": "cpu", "model": "dummy:tiny"}


def cases(suite: str, **options: str) -> list[Case]:
    return suite_named(suite).cases(default_options(**COMMON, **options))


def key(case: Case) -> str:
    return case.key(model_revision="m", dataset_revision="d")


#: of the first case of each suite, from before there were formats
OLD = {
    "compression": "sha256:50fe12eaa39e5756222bb4f7c4a9ca9cc47d597aae1cbe28f5453a767b75f81f",
    "perplexity": "sha256:4028a2c81e0a7018195a22c6df85f5d4ee52f649a60dff8a3151cae9591c3b82",
    "dse": "sha256:18a05ac670c56e8a08e7de945f75a587409d9cbf62744688cf3aa5eb4762da8a",
}


@pytest.mark.parametrize("suite", SUITES)
def test_auto_adds_nothing_to_parameters_ids_and_keys(suite: str) -> None:
    plain, asked = cases(suite), cases(suite, cache_dtype="auto,int8")
    as_before = asked[: len(plain)] if suite != "perplexity" else asked[0::2]
    assert [(one.id, one.params, key(one)) for one in as_before] == [(one.id, one.params, key(one)) for one in plain]
    assert all("kv_cache_dtype" not in one.params for one in plain)
    assert key(plain[0]) == OLD[suite]


@pytest.mark.parametrize("suite", [*SUITES, "pipeline"])
def test_every_case_runs_in_every_format_under_a_name_and_a_key_of_its_own(suite: str) -> None:
    plain = cases(suite)
    asked = cases(suite, cache_dtype="auto,int8,int8:int4(group=32)")
    assert len(asked) == 3 * len(plain)
    assert len({key(one) for one in asked}) == len({one.id for one in asked}) == len(asked)
    formats = [one.params.get("kv_cache_dtype") for one in asked]
    assert {found: formats.count(found) for found in formats} == dict.fromkeys(
        (None, "int8", "int8:int4(group=32)"), len(plain)
    )


@pytest.mark.parametrize("suite", SUITES)
def test_two_ways_to_write_a_format_are_one_key(suite: str) -> None:
    one, other = (cases(suite, cache_dtype=typed)[0] for typed in ("int4:int4(group=32)", "int4:int4( group=32 )"))
    assert key(one) == key(other)


@pytest.mark.parametrize(("suite", "engine"), [("dse", "mlc"), ("perplexity", "mlc")])
def test_engines_without_formats_refuse_them_and_name_the_one_that_has(suite: str, engine: str) -> None:
    [*_, case] = cases(suite, cache_dtype="int8")
    with pytest.raises(
        CaseInvalid,
        match=f"^--kv-cache-dtype=int8: engine {engine} .*--kv-cache-dtype=auto, or --kv-engine=hf for cases of one request$",
    ):
        get_engine(engine).refuse(case)
    for able in ("hf", "nano"):
        get_engine(able).refuse(case)
    [*_, plain] = cases(suite)
    get_engine(engine).refuse(plain)


@pytest.mark.parametrize("suite", SUITES)
def test_a_format_that_there_is_not_is_refused_before_anything_is_loaded(suite: str) -> None:
    with pytest.raises(UserError, match=r"^--kv-cache-dtype=int5: unknown format int5"):
        cases(suite, cache_dtype="int5")


def test_the_copying_cache_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match=r"^--kv-impl=copy and --kv-cache-dtype=int8: "):
        cases("compression", cache_dtype="auto,int8", impl="copy")
    assert cases("compression", cache_dtype="auto", impl="copy")


def test_a_residual_window_no_shorter_than_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="residual window of 300 tokens"):
        cases("compression", cache_dtype="int4(residual=300)")
    with pytest.raises(UserError, match="--kv-max-length"):
        cases("perplexity", cache_dtype="int4(residual=5000)")


@pytest.mark.parametrize("engine", ["hf", "nano"])
@pytest.mark.parametrize(
    ("name", "why"), [("int8(group=5)", "group=5 does not divide the head size 16"), ("by_layer(int8*7)", "7 layers")]
)
def test_heads_and_layers_that_a_model_lacks_are_refused_by_its_configuration(engine: str, name: str, why: str) -> None:
    [*_, case] = cases("compression", cache_dtype=name)
    with pytest.raises(CaseInvalid, match=f"^--kv-cache-dtype=.*{why}"):
        get_engine(engine).refuse(case)
