"""How many tokens a card holds in each cache format: the last one fits, and one more does not."""

from __future__ import annotations

import pytest

from kvsuite.__main__ import main
from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.case import Case
from kvsuite.memory_model.cache_room import cache_rooms, kv_bytes
from kvsuite.memory_model.config import architecture_of
from kvsuite.options.resolve import default_options
from kvsuite.suites.footprint import weights_and_cache

NAMES = ("auto", "fp8_e4m3", "int8", "int8:int4", "int4(group=32,residual=64)", "kivi_int4(group=32,residual=128)")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free", [1e6, 3.3e9, 58e9])
def test_the_longest_text_fits_and_a_longer_one_does_not(name: str, free: float) -> None:
    model, chosen = architecture_of("dummy:Qwen3-8B"), CacheFormat.parse(name)
    [room] = cache_rooms(model, 2, [chosen], free)
    assert room.tokens is not None
    assert kv_bytes(model, room.tokens, 2, chosen) <= free < kv_bytes(model, room.tokens + 1, 2, chosen)


def test_bytes_of_a_token_by_hand() -> None:
    # 36 layers of 8 heads with keys and values of 128
    found = cache_rooms(architecture_of("dummy:Qwen3-8B"), 2, [CacheFormat.parse(name) for name in NAMES[:4]], None)
    heads = 36 * 8
    assert [room.token_bytes for room in found] == [heads * 512, heads * 256, heads * 260, heads * 198]
    assert {room.tokens for room in found} == {None}


def test_what_a_model_cannot_have_has_a_reason_and_no_number() -> None:
    [group, auto] = cache_rooms(architecture_of("dummy:Qwen3-8B"), 2, [CacheFormat.parse("int4(group=48)"), None], 1e9)
    assert (group.token_bytes, group.tokens) == (None, None)
    assert group.reason == "group=48 does not divide the head size 128; group=32 does"
    assert auto.reason is None


def test_a_case_in_fewer_bits_has_a_smaller_footprint() -> None:
    workload = {"prompt_tokens": 4000, "max_new_tokens": 96}
    plain, packed = (
        weights_and_cache(
            Case("s", "hf", "dummy:Qwen3-8B", "n", "cuda", "bfloat16", workload=workload, params=params), options
        )
        for options in [default_options()]
        for params in ({}, {"kv_cache_dtype": "int8"})
    )
    assert plain.bytes is not None
    assert packed.bytes is not None
    assert plain.bytes - packed.bytes == 4096 * 36 * 8 * (512 - 260)


def test_the_command_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "--model", "dummy:Qwen3-8B", "--engine", "nano", "--space", "schemes", "--card", "80GiB"]
    assert main([*arguments, "--cache-dtype", "auto,int8:int4(group=32,residual=64)"]) == 0
    shown = capsys.readouterr().out
    [room] = [line.split() for line in shown.splitlines() if line.startswith("auto ")]
    assert room[1] == "144.000"
    # what it takes is told, and that the engine that was named does not store it
    [row] = [line for line in shown.splitlines() if line.startswith("int8:int4(group=32,residual=64) ")]
    assert row.split()[1] == "61.312"
    why = "--kv-cache-dtype=int8:int4(group=32,residual=64) on engine nano: pages hold tokens in one form for all sequences"
    assert why in " ".join(shown.split())
    assert shown.count("--kv-cache-dtype=") == 1
    assert main([*arguments, "--cache-dtype", "int5"]) == 4
