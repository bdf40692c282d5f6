"""Names of cache formats: every one is parsed, printed and parsed again; what there is not is refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.cache_formats.chosen_format import ChosenFormat, format_of, refuse_long_residual, selected_cache_formats
from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options

groups = st.integers(2, 512)
token_sides = st.builds(
    SideFormat,
    st.sampled_from(["fp8_e4m3", "int8", "int4"]),
    group=st.none() | groups,
    hadamard=st.booleans(),
)
plain = st.just(SideFormat("auto"))


@st.composite
def formats(draw: st.DrawFn) -> CacheFormat:
    keys, values = draw(token_sides | plain), draw(token_sides)
    channels = draw(groups)
    if draw(st.booleans()) and keys.is_packed:
        keys = SideFormat(keys.number, True, channels, keys.hadamard)
    if draw(st.booleans()):
        values = SideFormat(values.number, True, channels, values.hadamard)
    if draw(st.booleans()):
        keys = values
    return CacheFormat(keys, values, draw(st.integers(0, 300)))


@given(formats())
def test_a_printed_format_is_parsed_as_itself(chosen: CacheFormat) -> None:
    assert CacheFormat.parse(str(chosen)) == chosen


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("fp8", "fp8_e4m3"),
        ("fp8:int8(group=8)", "fp8_e4m3:int8(group=8)"),
        ("int8", "int8"),
        ("int8:int8", "int8"),
        (" int8 : int4 ", "int8:int4"),
        ("int4(residual=64, group=32)+hadamard", "int4(group=32,residual=64)+hadamard"),
        ("int4(residual=8):int8", "int4:int8(residual=8)"),
        ("kivi_int4", "kivi_int4(group=32,residual=128)"),
        ("int4_channel(group=16):int4(group=16,residual=4)", "kivi_int4(group=16,residual=4)"),
        ("int4_channel:int8", "int4_channel(group=32):int8"),
        ("auto:int4", "auto:int4"),
    ],
)
def test_names(typed: str, printed: str) -> None:
    assert str(CacheFormat.parse(typed)) == printed


@pytest.mark.parametrize("typed", ["auto", "auto:auto"])
def test_auto_is_no_format(typed: str) -> None:
    assert CacheFormat.parse(typed) is None


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("int5", "unknown format int5"),
        ("int4:int8:int4", "more than keys and values"),
        ("int4(group=0)", "group=0"),
        ("int4(grup=3)", "no parameter grup"),
        ("int4(group=3,group=3)", "given twice"),
        ("int4(residual=-1)", "residual=-1"),
        ("kivi_int4:int8", "says both"),
        ("int8+rotated", "+rotated"),
        ("auto(group=3)", "without groups"),
        ("auto(residual=3)", "no residual window"),
        ("int4(residual=3):int4(residual=4)", "one residual window"),
        ("int4:", "is no format"),
        ("int4_channel(group=1)", "no group"),
        ("int4_channel(group=16):int8_channel(group=32)", "must be equal"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(typed: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        CacheFormat.parse(typed)
    text = str(refused.value)
    assert said in text
    assert text.startswith(f"--kv-cache-dtype={typed}: ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("typed", "sizes", "said"),
    [
        ("int4(group=48)", (64, 64), "group=48 does not divide the head size 64; group=32 does"),
        ("int8:int4(group=32)", (64, 80), "group=32 does not divide the head size 80; group=20 does"),
        ("int8+hadamard", (80, 80), "power of two"),
        ("int4", (15, 15), "odd"),
    ],
)
def test_a_head_size_that_a_format_has_nothing_for(typed: str, sizes: tuple[int, int], said: str) -> None:
    chosen = CacheFormat.parse(typed)
    assert chosen is not None
    assert said in str(chosen.refused(*sizes))
    assert chosen.refused(960, 960) is None or "hadamard" in typed


def test_the_boundary_moves_by_whole_groups_behind_the_residual_window() -> None:
    tokens = CacheFormat(SideFormat("int4"), SideFormat("int4"), 3)
    assert [tokens.boundary(seen) for seen in range(1, 7)] == [0, 0, 0, 1, 2, 3]
    groups = CacheFormat(SideFormat("int4", True, 4), SideFormat("int4", group=4), 2)
    assert [groups.boundary(seen) for seen in range(1, 12)] == [0] * 5 + [4] * 4 + [8] * 2


def test_bytes_by_hand() -> None:
    shape = {"kv_heads": 3, "key_dim": 64, "value_dim": 64, "element_bytes": 4}
    # codes, scale, least value
    int4 = CacheFormat.parse("int4(group=32)")
    assert int4 is not None
    assert int4.layer_bytes(10, 10, **shape) == 3 * 10 * 2 * (32 + 2 * 4)
    apart = CacheFormat.parse("int8:int4(residual=4)")
    assert apart is not None
    assert apart.layer_bytes(10, 100, **shape) == 3 * (10 * (64 + 2) + 10 * (32 + 4) + 4 * 2 * 256)
    kivi = CacheFormat.parse("kivi_int4(group=4,residual=2)")
    assert kivi is not None
    # 8 packed and 3 as they are: keys have 64 scales and least values a group, values 16 a token
    assert kivi.layer_bytes(11, 11, **shape) == 3 * (8 * 32 + 2 * 64 * 4 + 8 * 32 + 8 * 16 * 4 + 3 * 2 * 256)
    fp8 = CacheFormat.parse("fp8_e4m3")
    assert fp8 is not None
    assert fp8.layer_bytes(10, 10, **shape) == 3 * 10 * 128


def test_the_option_names_formats_once() -> None:
    auto, int8 = selected_cache_formats(default_options(cache_dtype="auto,int8"))
    assert auto.format is None
    assert auto.parameters == {}
    assert auto.named("baseline") == "baseline"
    assert int8.named("baseline") == "baseline_int8"
    with pytest.raises(UserError, match="int8:int8 and int8 are one format"):
        selected_cache_formats(default_options(cache_dtype="int8,int8:int8"))


def test_a_case_carries_its_format() -> None:
    case = Case("compression", "hf", "m", "n", "cpu", "float32", params={"kv_cache_dtype": "int8:int4"})
    assert format_of(case) == CacheFormat(SideFormat("int8"), SideFormat("int4"))
    assert format_of(Case("compression", "hf", "m", "n", "cpu", "float32")) is None


def test_a_residual_window_in_which_the_text_lies_is_refused() -> None:
    chosen = ChosenFormat(CacheFormat.parse("int4(residual=64)"))
    refuse_long_residual(chosen, 65, "--kv-max-tokens")
    with pytest.raises(UserError, match="residual window of 64 tokens is no shorter than the text of 64"):
        refuse_long_residual(chosen, 64, "--kv-max-tokens")
