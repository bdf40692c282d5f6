"""Whether a point fits a card, and what makes it fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.engines.mlc.memory_model import MlcMemory
from kvsuite.engines.nano.memory_model import NanoMemory
from kvsuite.errors import UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.design_point import DesignPoint, broken_rules
from kvsuite.memory_model.fit import Card, Mend, fits, mends, parse_card
from kvsuite.memory_model.prediction import JSON_CHUNK, MIB, Predictor

GIB = 1 << 30


def predictor(engine: str = "mlc", preset: str = "Llama-3-8B") -> Predictor:
    architecture = architecture_of(f"dummy:{preset}")
    return MlcMemory.of(architecture) if engine == "mlc" else NanoMemory(architecture)


def card(gib: float) -> Card:
    return Card(int(gib * GIB), 1.0)


def applied(model: Predictor, point: DesignPoint, mend: Mend) -> tuple[Predictor, DesignPoint]:
    """The point and the predictor with a mend's settings, made anew."""
    changes: dict[str, Any] = dict(mend.changes)
    if chunk := changes.pop(JSON_CHUNK, None):
        assert isinstance(model, MlcMemory)
        model = replace(model, json_chunk=chunk)
    if stored := changes.pop("kv_cache_dtype", None):
        assert isinstance(model, NanoMemory)
        model = replace(model, cache_format=CacheFormat.parse(stored))
    return model, replace(point, **changes)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24", 24 * GIB), ("80 GB", 80 * 10**9), ("0.5gib", GIB // 2), ("6144MiB", 6 * GIB)],
)
def test_sizes_of_cards(text: str, size: int) -> None:
    assert parse_card(text, 0.5) == Card(size, 0.5)
    assert parse_card(text, 0.5).usable == size / 2


@pytest.mark.parametrize("text", ["", "big", "0", "-4", "24TB", "24 GiB card", "1e3"])
def test_what_is_no_card(text: str) -> None:
    with pytest.raises(UserError, match=r"--card=.*: no size of a card; use GiB, such as 24GiB"):
        parse_card(text, 0.5)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(UserError, match=r"--card-share=.*must lie above 0"):
        parse_card("24", share)


def test_shares_are_the_engines_own() -> None:
    assert {name: predictor(name).share for name in ("mlc", "nano")} == {"mlc": 0.85, "nano": 0.9}


def test_the_edge() -> None:
    predicted = predictor("nano").predict(DesignPoint("none", 4096, 1024, 1))
    assert predicted.needed is not None
    assert fits(predicted, Card(int(predicted.needed), 1.0)) is True
    assert fits(predicted, Card(int(predicted.needed) - 1, 1.0)) is False


def test_what_is_not_known_fits_or_not_only_by_what_is_known() -> None:
    point = DesignPoint("q4f16_1", 4096, 1024, 1)
    predicted = predictor(preset="Qwen3-8B").predict(point)
    assert fits(predicted, card(80)) is None
    assert fits(predicted, card(2)) is False
    assert mends(predictor(preset="Qwen3-8B"), point, card(2)) == []


def test_a_point_that_fits_needs_no_mend() -> None:
    assert mends(predictor(), DesignPoint("q4f16_1", 4096, 1024, 1), card(24)) == []


def test_each_setting_alone_where_one_is_enough() -> None:
    found = mends(predictor("nano"), DesignPoint("none", 16384, 2048, 4), card(22))
    assert [str(mend) for mend in found[:4]] == [
        "context_window_size=8192", "max_batch_size=2", "sliding_window_size=8192", "quantization=q4f16_1",
    ]  # fmt: skip


def test_the_json_chunk_is_a_setting_of_mlc() -> None:
    # users lower the context or the chunk and nothing happens to the auxiliary buffers; this is what moves them
    point = DesignPoint("q4f16_1", 4096, 1024, 1)
    needed = predictor().predict(point).needed
    assert needed is not None
    found = mends(predictor(), point, Card(int(needed - 100 * MIB), 1.0))
    assert {JSON_CHUNK: 4096} in [mend.changes for mend in found]


def test_several_together_where_none_is_enough() -> None:
    point = DesignPoint("q0f16", 16384, 4096, 8)
    (mend,) = mends(predictor(), point, card(5.2))
    assert str(mend) == "quantization=q3f16_1 and context_window_size=4096 and prefill_chunk_size=2048"


def test_a_card_smaller_than_the_weights_gets_no_advice() -> None:
    assert mends(predictor(), DesignPoint("q0f16", 16384, 4096, 8), card(2)) == []


def test_an_inert_window_is_no_advice() -> None:
    found = mends(predictor(), DesignPoint("q4f16_1", 16384, 4096, 8, 2048, 64), card(7.5))
    assert found
    assert not any("sliding_window_size" in mend.changes for mend in found)


def test_a_cache_in_fewer_bits_is_advice_where_it_is_enough_and_the_engine_stores_it() -> None:
    point = DesignPoint("q4f16_1", 16384, 1024, 16)
    model = predictor("nano")
    plain = model.predict(point)
    pool = plain.part("kv_cache")
    assert plain.needed is not None
    assert pool is not None
    # 130 bytes in the place of 256
    room = (plain.needed - 0.4 * pool) / GIB
    assert "kv_cache_dtype=int8" in map(str, mends(model, point, card(room)))
    room = (plain.needed - 0.6 * pool) / GIB
    assert "kv_cache_dtype=int8:int4" in map(str, mends(model, point, card(room)))
    assert not any("kv_cache" in str(mend) for mend in mends(predictor("mlc"), point, card(room)))


@settings(max_examples=60)
@given(
    engine=st.sampled_from(["mlc", "nano"]),
    name=st.sampled_from(["q0f16", "q0f32", "q4f16_1", "q4f32_1"]),
    context=st.sampled_from([1024, 4096, 16384]),
    chunk=st.sampled_from([512, 1024, 4096]),
    batch=st.integers(1, 32),
    window=st.sampled_from([(), (1024, 128), (512, 0)]),
    gib=st.floats(2, 40),
)
def test_advice_is_true(
    engine: str, name: str, context: int, chunk: int, batch: int, window: tuple[int, ...], gib: float
) -> None:
    point = DesignPoint(name, context, min(chunk, context), batch, *window)
    model = predictor(engine)
    before = model.predict(point)
    found = mends(model, point, card(gib))
    assert not (found and fits(before, card(gib)))
    assert len({str(mend) for mend in found}) == len(found)
    for mend in found:
        changed, where = applied(model, point, mend)
        after = changed.predict(where)
        assert after.needed == mend.needed
        assert fits(after, card(gib))
        assert not broken_rules(where)
        assert all(mend.changes[key] != value for key, value in point.settings().items() if key in mend.changes)
        # nobody gets wider numbers to save memory
        assert "f32" not in where.quantization or "f32" in point.quantization
