"""The design space: 396 points in the original's order, rules that bite, ids that round-trip, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.case import id_token
from kvsuite.engines.mlc.engine import MlcEngine
from kvsuite.engines.nano.engine import NanoEngine
from kvsuite.errors import UserError
from kvsuite.memory_model.design_point import AXES, OFF, RULES, TRAINED_LENGTH
from kvsuite.memory_model.design_space import NAMED, SCHEMES, DesignPoint, DesignSpace, named_space
from kvsuite.memory_model.space_text import EXAMPLE, parse_space


def full() -> DesignSpace:
    return named_space("full", ["q4f16_1"])


def refusal(text: str, **more: object) -> str:
    with pytest.raises(UserError) as refused:
        parse_space(text, **more)  # type: ignore[arg-type]
    return str(refused.value)


def settings(point: DesignPoint) -> tuple[int, ...]:
    return tuple(point.settings().values())


# the space


def test_the_full_space_has_the_originals_396_points_in_its_order() -> None:
    points = full().points
    assert len(points) == len(set(points)) == 396
    assert settings(points[0]) == (4096, 1024, 1, OFF, 0)
    assert settings(points[-1]) == (16384, 4096, 8, 4096, 256)
    assert Counter(point.sliding_window_size for point in points) == {OFF: 36, 2048: 180, 4096: 180}
    assert [settings(point) for point in points] == sorted(map(settings, points))
    # 36 without a window, then the sinks of the first window
    assert [settings(point)[3:] for point in points[:4]] == [(OFF, 0), (2048, 0), (2048, 32), (2048, 64)]


def test_invalid_points_are_kept_and_name_their_rule() -> None:
    space = full()
    assert len(space.entries) == 540
    assert len(space.invalid) == 144
    assert {entry.broken[0].rule for entry in space.invalid} == {"sink-needs-window"}
    assert (
        str(space.invalid[0].broken[0]) == "breaks sink-needs-window: attention_sink_size=32 without a sliding window"
    )
    assert all(
        point.sliding_window_size // 8 >= point.attention_sink_size for point in space.points if point.has_window
    )


def test_weight_formats_are_outermost() -> None:
    points = named_space("full", ["q0f16", "q4f16_1"]).points
    assert len(points) == 792
    assert [point.quantization for point in points] == ["q0f16"] * 396 + ["q4f16_1"] * 396
    assert [settings(point) for point in points[:396]] == [settings(point) for point in points[396:]]


@pytest.mark.parametrize(
    ("text", "axis", "valid", "rule"),
    [
        ("ctx=1024;chunk=512,2048", "prefill_chunk_size", [512], "chunk-within-context"),
        ("window=off;sink=0,4", "attention_sink_size", [0], "sink-needs-window"),
        ("window=1024;sink=0,128,129,256", "attention_sink_size", [0, 128], "sink-within-eighth-of-window"),
    ],
)
def test_spaces_in_which_each_rule_bites(text: str, axis: str, valid: list[int], rule: str) -> None:
    space = parse_space(text).judged(None, is_dummy=False, own=MlcEngine.point_rules)
    assert [getattr(point, axis) for point in space.points] == valid
    assert {tuple(broken.rule for broken in entry.broken) for entry in space.invalid} == {(rule,)}
    assert len(space.entries) == len(space.points) + len(space.invalid)
    assert all(str(getattr(entry.point, axis)) in entry.broken[0].reason for entry in space.invalid)


def test_a_point_can_break_several_rules() -> None:
    space = parse_space("ctx=512;chunk=1024;sink=4").judged(None, is_dummy=False, own=MlcEngine.point_rules)
    (entry,) = space.invalid
    assert [broken.rule for broken in entry.broken] == ["chunk-within-context", "sink-needs-window"]
    assert set(RULES) == {"sink-needs-window", "sink-within-eighth-of-window"}


def test_a_step_over_several_prompts_is_no_fault_but_of_an_engine_that_says_so() -> None:
    space = parse_space("ctx=4096;pc=16384;batch=64")
    assert [len(space.judged(None, is_dummy=False, own=of.point_rules).points) for of in (NanoEngine, MlcEngine)] == [
        1,
        0,
    ]


def test_points_beyond_the_trained_length_are_invalid_or_flagged() -> None:
    real = full().judged(8192, is_dummy=False, own={})
    assert len(real.points) == 264
    beyond = [entry for entry in real.invalid if entry.point.context_window_size == 16384]
    assert {entry.broken[-1].rule for entry in beyond} == {TRAINED_LENGTH}
    assert "16384 is more than the 8192 positions" in beyond[0].broken[-1].reason
    dummy = full().judged(8192, is_dummy=True, own={})
    assert len(dummy.points) == 396
    flagged = [entry for entry in dummy.entries if entry.flags]
    assert {entry.point.context_window_size for entry in flagged} == {16384}
    assert "random weights" in flagged[0].flags[0]
    assert full().judged(None, is_dummy=False, own={}) == full().judged(16384, is_dummy=False, own={}) == full()


def test_the_schemes_are_the_originals() -> None:
    points = named_space("schemes", ["q4f16_1"]).points
    assert [settings(point) for point in points] == [
        (4096, 1024, 16, OFF, 0), (4096, 2048, 32, OFF, 0), (8192, 4096, 64, OFF, 0),
    ]  # fmt: skip
    assert [scheme.library for scheme in SCHEMES] == ["test_dse_small.so", "test_dse_mid.so", "test_dse_large.so"]


def test_the_small_space_moves_every_axis_alone() -> None:
    space = named_space("small", ["q4f16_1"])
    assert not space.invalid
    base, *others = map(settings, space.points)
    moved = [[axis.name for axis, a, b in zip(AXES, base, other, strict=True) if a != b] for other in others]
    assert moved == [
        ["context_window_size"], ["prefill_chunk_size"], ["max_batch_size"], ["sliding_window_size"],
        ["sliding_window_size", "attention_sink_size"],
    ]  # fmt: skip
    # of the last two only the sink differs
    assert others[-2][:4] == others[-1][:4]


# ids


points = st.builds(
    DesignPoint,
    quantization=st.sampled_from(["q0f16", "q3f16_1", "q4f16_autoawq", "none", "e4m3_e4m3_f16"]),
    context_window_size=st.integers(1, 1 << 20),
    prefill_chunk_size=st.integers(1, 1 << 20),
    max_batch_size=st.integers(1, 300),
    sliding_window_size=st.just(OFF) | st.integers(1, 1 << 20),
    attention_sink_size=st.integers(0, 4096),
)


@given(points)
def test_ids_round_trip(point: DesignPoint) -> None:
    assert DesignPoint.from_id(point.id) == point
    # a piece of a pytest id as it is
    assert id_token(point.id) == point.id


def test_ids_look_like_the_ones_that_k_selects() -> None:
    assert DesignPoint("q4f16_1", 4096, 1024, 16).id == "q4f16_1-ctx4096-pc1024-bs16-swoff-sink0"
    assert DesignPoint("q0f32", 8192, 1024, 4, 2048, 128).id == "q0f32-ctx8192-pc1024-bs04-sw2048-sink128"
    ids = [point.id for point in full().points]
    assert len(set(ids)) == 396
    selected = [name for name in ids if all(word in name for word in ("ctx8192", "bs04"))]
    assert len(selected) == 33


@pytest.mark.parametrize(
    "text",
    [
        "", "q4f16_1", "q4f16_1-ctx4096-pc1024-bs4-swoff-sink0", "q4f16_1-ctx04096-pc1024-bs04-swoff-sink0",
        "q4f16_1-ctx4096-pc1024-bs04-sw-1-sink0", "nano-q4f16_1-ctx4096-pc1024-bs16-swoff-sink0",
        "q4f16_1-ctx4096-pc1024-bs16-swoff-sink0 ", "q4f16_1-ctx0-pc1024-bs16-swoff-sink0",
    ],
)  # fmt: skip
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(UserError):
        DesignPoint.from_id(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("q4f16_1", 0, 1, 1), "context_window_size=0: must be a whole number of at least 1"),
        (("q4f16_1", 1, 1, True), "max_batch_size=True: must be"),
        (("q4f16_1", 1, 1, 1, 0), "sliding_window_size=0: must be off (-1) or"),
        (("q4f16_1", 1, 1, 1, 8, -1), "attention_sink_size=-1: must be a whole number of at least 0"),
        (("q4-f16", 1, 1, 1), "quantization=q4-f16: a weight format has letters"),
    ],
)
def test_values_that_no_point_has(values: tuple, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        DesignPoint(*values)


# what --kv-space says


def test_the_example_is_what_it_says() -> None:
    space = parse_space(EXAMPLE)
    assert space.name == EXAMPLE
    assert {axis.name: sorted({getattr(e.point, axis.name) for e in space.entries}) for axis in AXES} == {
        "context_window_size": [4096, 8192], "prefill_chunk_size": [1024], "max_batch_size": [1, 4],
        "sliding_window_size": [OFF, 2048], "attention_sink_size": [0, 4],
    }  # fmt: skip
    assert (len(space.points), len(space.invalid)) == (12, 4)


def test_axes_by_the_originals_names_in_the_given_order() -> None:
    text = "max_batch_size=2;context_window_size=8192,4096;sliding_window_size=-1; quantization = q0f16 , q4f16_1 "
    points = parse_space(text).points
    assert [(p.quantization, p.context_window_size) for p in points] == [
        ("q0f16", 8192), ("q0f16", 4096), ("q4f16_1", 8192), ("q4f16_1", 4096),
    ]  # fmt: skip
    assert {p.max_batch_size for p in points} == {2}


def test_products_are_joined_and_a_point_of_two_of_them_is_one() -> None:
    text = "quant=q0f16,q4f16_1; ctx=2048,8192;chunk=512 | ctx=8192;batch=1,4;chunk=512 | ctx=4096"
    points = parse_space(text).points
    assert [(p.context_window_size, p.prefill_chunk_size, p.max_batch_size) for p in points if p.quantization == "q0f16"] == [
        (2048, 512, 1), (8192, 512, 1), (8192, 512, 4), (4096, 1024, 1),
    ]  # fmt: skip
    assert [p.quantization for p in points] == ["q0f16"] * 4 + ["q4f16_1"] * 4


def test_a_chunk_that_nobody_named_breaks_no_rule() -> None:
    assert [p.prefill_chunk_size for p in parse_space("ctx=512,4096").points] == [512, 512]
    named = parse_space("ctx=512,4096;chunk=1024").judged(None, is_dummy=False, own=MlcEngine.point_rules)
    assert len(named.invalid) == 1


@pytest.mark.parametrize("name", NAMED)
def test_spaces_with_a_name_take_weight_formats_from_elsewhere(name: str) -> None:
    space = parse_space(f" {name} ", quantizations=["q0f16", "q4f32_1"])
    assert list(dict.fromkeys(p.quantization for p in space.points)) == ["q0f16", "q4f32_1"]
    assert {p.quantization for p in parse_space(name).points} == {"q4f16_1"}
    assert {p.quantization for p in parse_space(name, default=["none"]).points} == {"none"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("huge", "--kv-space=huge: no such space; give schemes, small, full or axes such as"),
        ("", "--kv-space=: no such space"),
        ("full;batch=2", "full is not axis=value,value; the names schemes, small, full stand alone"),
        ("ctx=4096;blocks=16", "no axis blocks; the axes are ctx, chunk, batch, window, sink, quant"),
        ("ctx=4096;context=8192", "context_window_size is named twice; name it once, with all its values"),
        ("q=q0f16;quant=q4f16_1", "quantization is named twice"),
        ("ctx=4096,4096", "ctx has the value 4096 twice; ids would not be unique"),
        ("ctx=4k", "ctx=4k must be a whole number of at least 1"),
        ("ctx=", "ctx= must be a whole number of at least 1"),
        ("ctx=4096,", "ctx= must be a whole number of at least 1"),
        ("batch=0", "batch=0 must be a whole number of at least 1"),
        ("batch=-1", "batch=-1 must be a whole number of at least 1"),
        ("batch=²", "batch=² must be a whole number"),
        ("window=0", "window=0 must be off (-1) or a whole number of at least 1"),
        ("sink=off", "sink=off must be a whole number of at least 0"),
        ("ctx=4096|", "an empty product"),
        ("ctx=4096|full", "full is not axis=value,value"),
        ("quant=q0f16;ctx=4096|quant=q0f16;batch=2", "quantization is named twice; name it once, it is that of all"),
        ("quant=q4f16_1,", "a weight format is empty"),
        ("quant=q4f16_1,q4f16_1", "quantization has the value q4f16_1 twice"),
        ("quant=q4-f16", "quantization=q4-f16: a weight format has letters"),
    ],
)
def test_what_is_refused_and_how(text: str, message: str) -> None:
    assert message in refusal(text)


def test_weight_formats_are_given_once() -> None:
    assert "quantization is given here and as an option" in refusal("quant=q0f16", quantizations=["q4f16_1"])
    assert refusal("nope", option="--space").startswith("--space=nope: ")


pieces = st.sampled_from(
    ["ctx", "batch", "window", "sink", "quant", "full", "=", "=", ";", "|", ",", "1", "128", "off", "-1", " "]
)


@given(st.lists(pieces, max_size=8).map("".join) | st.text(max_size=20))
def test_any_text_is_a_space_or_a_user_error(text: str) -> None:
    try:
        space = parse_space(text)
    except UserError:
        return
    assert space.entries


def test_the_space_needs_neither_torch_nor_pytest() -> None:
    heavy = "{'torch', 'pytest', 'transformers'}"
    code = f"import sys, kvsuite.memory_model.space_text; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
