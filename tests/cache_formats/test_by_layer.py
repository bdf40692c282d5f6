"""A format for each layer: its name, the files it comes from, and its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.cache_formats.by_layer import ByLayerFormat, kv_bytes
from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.cache_formats.chosen_format import ChosenFormat, parse_format
from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.cache_room import cache_rooms
from kvsuite.memory_model.config import architecture_of

NAMES = (
    "auto",
    "int8",
    "int4(group=32,residual=3)",
    "auto:int4",
    "kivi_int4(group=8,residual=5)",
    "int8+hadamard:int4",
)


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=12).filter(lambda names: set(names) != {"auto"}))
def test_a_printed_format_is_parsed_as_itself(names: list[str]) -> None:
    chosen = ByLayerFormat(tuple(CacheFormat.parse(name) for name in names))
    assert parse_format(str(chosen)) == chosen
    assert [str(one or "auto") for one in chosen.layers] == names


def test_one_assignment_has_one_name_however_it_is_written(tmp_path: Path) -> None:
    listed = tmp_path / "assignment.json"
    listed.write_text(json.dumps(["int8", "int8", "int8:int4", "auto"]))
    ways = ["by_layer(int8*2|int8:int4|auto)", "by_layer(int8|int8|int8:int4*1|auto)", f" by_layer({listed}) "]
    found = {parse_format(way) for way in ways}
    assert len(found) == 1
    [one] = found
    assert str(one) == ways[0]
    named = ChosenFormat(one)
    assert named.parameters == {"kv_cache_dtype": ways[0]}
    assert named.named("baseline") == f"baseline_{one.label}"
    assert one.label != parse_format("by_layer(int8*2|int8:int4|int8)").label


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("by_layer(int5*3)", "unknown format int5"),
        ("by_layer(int8*0)", r"int8\*0"),
        ("by_layer(int8*x)", r"int8\*x"),
        ("by_layer(auto*4)", "no layer has another format than auto"),
        ("by_layer", r"write by_layer\(FORMAT"),
        ("by_layer(int8)x", r"write by_layer\(FORMAT"),
        ("by_layer(hqq_int4*3)", "unknown format hqq_int4"),
        ("by_layer(nowhere.json)", "cannot be read"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(typed: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^--kv-cache-dtype=[^\n]*{said}[^\n]*$"):
        parse_format(typed)


def test_a_file_that_is_no_list_of_names_is_refused(tmp_path: Path) -> None:
    listed = tmp_path / "assignment.json"
    listed.write_text('{"int8": 3}')
    with pytest.raises(UserError, match="is no JSON list"):
        parse_format(f"by_layer({listed})")


def test_bytes_are_the_sum_of_the_layers() -> None:
    of = architecture_of("dummy:tiny").cache
    assert not isinstance(of, str)
    held = [7, 50, 50, 50]
    names = ["auto", "int4(residual=3)", "kivi_int4(group=8,residual=5)", "auto:int8"]
    alone = [
        kv_bytes(CacheFormat.parse(name), of, [tokens if at == layer else 0 for at, tokens in enumerate(held)], 60, 4)
        for layer, name in enumerate(names)
    ]
    # residual windows of empty layers are counted above, and so are not in the way
    alone[1] -= 3 * kv_bytes(CacheFormat.parse(names[1]), of, [0] * 4, 60, 4) // 4
    chosen = parse_format(f"by_layer({'|'.join(names)})")
    assert isinstance(chosen, ByLayerFormat)
    assert kv_bytes(chosen, of, held, 60, 4) == sum(alone)


def test_another_number_of_layers_is_refused() -> None:
    chosen = parse_format("by_layer(int8*3)")
    assert isinstance(chosen, ByLayerFormat)
    with pytest.raises(CaseInvalid, match="formats for 3 layers, and the model has 36"):
        chosen.of_layers(36)
    [room] = cache_rooms(architecture_of("dummy:Qwen3-8B"), 2, [chosen], 1e9)
    assert "formats for 3 layers" in str(room.reason)


def test_an_engine_with_one_format_for_all_layers_refuses_it() -> None:
    case = Case(
        "pipeline", "nano", "dummy:tiny", "case", "cpu", "float32", params={"kv_cache_dtype": "by_layer(int8*4)"}
    )
    with pytest.raises(CaseInvalid, match="by_layer-"):
        get_engine("nano").refuse(case)
    get_engine("hf").refuse(case)
