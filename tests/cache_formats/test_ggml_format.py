"""llama.cpp's types as cache formats: names, bytes, and who refuses them."""

from __future__ import annotations

import pytest

from kvsuite.cache_formats.by_layer import kv_bytes
from kvsuite.cache_formats.chosen_format import parse_format
from kvsuite.cache_formats.ggml_format import GGML_TYPES, GgmlFormat
from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.models.layers import layers_of
from kvsuite.models.presets import PRESETS


@pytest.mark.parametrize("keys", GGML_TYPES)
def test_a_name_stands_for_both_sides_and_two_for_keys_and_values(keys: str) -> None:
    assert parse_format(keys) == parse_format(f"{keys}:{keys}") == GgmlFormat(keys, keys)
    assert parse_format(f" {keys} : f16 ") == GgmlFormat(keys, "f16")
    assert str(GgmlFormat(keys, keys)) == keys
    for values in GGML_TYPES:
        assert parse_format(str(GgmlFormat(keys, values))) == GgmlFormat(keys, values)


@pytest.mark.parametrize("typed", ["q8_0:int4", "auto:q8_0", "q8_0:", "f16:f16:f16", "q8_0:q4_K"])
def test_what_is_not_two_of_its_types_is_one_line(typed: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--kv-cache-dtype={typed}: a type of llama.cpp stands for both, or beside"
    ) as refused:
        parse_format(typed)
    assert "\n" not in str(refused.value)


def test_a_type_that_it_does_not_have_is_told_which_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown format q4_K; use .*f32, f16, bf16, q8_0"):
        parse_format("q4_K")


def test_bytes_are_whole_blocks_of_every_vector() -> None:
    of = layers_of(PRESETS["Llama-3.2-1B"])
    tokens = [100] * 16
    # 8 heads of 64 numbers: 2 blocks of 34 bytes, 2 of 18
    assert kv_bytes(GgmlFormat("q8_0", "q4_0"), of, tokens, 100, 4) == 16 * 100 * 8 * (2 * 34 + 2 * 18)
    assert kv_bytes(GgmlFormat("f16", "f16"), of, tokens, 100, 4) == of.kv_bytes(tokens, 2)
    assert GgmlFormat("q8_0", "f16").refused(64, 80) is None
    assert "head size 80 is no multiple" in str(GgmlFormat("f16", "q4_0").refused(64, 80))


@pytest.mark.parametrize("engine", ["hf", "nano", "mlc"])
def test_other_engines_refuse_them_and_name_the_one_that_has_them(engine: str) -> None:
    case = Case(
        suite="compression", engine=engine, model="dummy:tiny", name="one", device="cpu", dtype="float32",
        params={"kv_cache_dtype": "q8_0"},
    )  # fmt: skip
    with pytest.raises(
        CaseInvalid, match=rf"^--kv-cache-dtype=q8_0: is llama.cpp's, (and|which) engine {engine} .*llamacpp"
    ):
        get_engine(engine).refuse(case)
