"""Ids, -k, and the order in which cases run."""

from __future__ import annotations

import re

import pytest
from pytest_runs import copy_benchmarks, rotated

from kvsuite.options.resolve import default_options
from kvsuite.suites.compression.cases import compression_cases
from kvsuite.suites.dse.cases import dse_cases

pytestmark = pytest.mark.usefixtures("what_runs_import")

EVERYTHING = (
    "--kv-method=streaming_llm,recent_only,fix_size_l2,l2_compress,kvpress:SnapKV,kvpress:DMS",
    "--kv-keep-ratios=0.25,0.24,1.0",
    "--kv-strategies=keep_low,keep_high,random",
    "--kv-l2-mode=interval=16",
)


def collected(pytester: pytest.Pytester, *arguments: str) -> list[str]:
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:warnings", *arguments)
    assert result.ret == 0
    return [line.partition("[")[2].removesuffix("]") for line in result.outlines if "::" in line]


def test_streaming_groups_by_k(benchmarks: pytest.Pytester) -> None:
    ids = collected(benchmarks, "-k", "compression and streaming")
    assert sorted(ids) == ["hf-streaming_128", "hf-streaming_32", "hf-streaming_64"]


def test_k_tells_engine_and_sizes_apart(benchmarks: pytest.Pytester) -> None:
    assert collected(benchmarks, "-k", "compression and hf and recent_only_64") == ["hf-recent_only_64"]
    assert collected(benchmarks, "-k", "fix32_keep_low_kr0.5", "--kv-method=fix_size_l2") == ["hf-fix32_keep_low_kr0.5"]


def test_ids_hold_only_characters_that_k_and_file_names_can_take(benchmarks: pytest.Pytester) -> None:
    ids = collected(benchmarks, *EVERYTHING)
    assert len(ids) == len(set(ids)) > 20
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", one) for one in ids)


def test_both_position_policies_have_ids_of_their_own(benchmarks: pytest.Pytester) -> None:
    ids = collected(benchmarks, "--kv-positions=both", "--kv-recent-sizes=28")
    assert sorted(ids) == sorted(
        ["hf-baseline"] + [f"hf-{name}_32{mark}" for name in ("recent_only", "streaming") for mark in ("", "_poscache")]
    )


def test_order_is_the_space_rotated_by_the_seed_in_the_header(benchmarks: pytest.Pytester) -> None:
    space = [case.id for case in compression_cases(default_options())]
    seeds = set()
    for _ in range(2):
        result = benchmarks.runpytest_inprocess("--collect-only", "-p", "no:warnings")
        seed = int(re.search(r"order seed (\d+)", result.stdout.str())[1])
        ids = re.findall(r"<Function test_compression\[(.*)\]>", result.stdout.str())
        assert ids == rotated(space, seed)
        seeds.add(seed)
    assert len(seeds) == 2, "a method that always runs first pays the warm-up of all"


def test_shards_of_any_order_of_collection_are_a_partition(benchmarks: pytest.Pytester) -> None:
    whole = collected(benchmarks)
    first = collected(benchmarks, "--kv-shard=1/2")
    # as a plugin that shuffles, or paths in another order
    benchmarks.makeconftest(
        "import pytest\n"
        "@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_collection_modifyitems(items):\n"
        "    items.insert(0, items.pop())"
    )
    second = collected(benchmarks, "--kv-shard=2/2")
    assert first
    assert sorted([*first, *second]) == sorted(whole)


def test_other_tests_keep_their_place(benchmarks: pytest.Pytester) -> None:
    benchmarks.makepyfile(test_a="def test_a(): pass", test_z="def test_z(): pass")
    result = benchmarks.runpytest_inprocess("--collect-only", "-q", "test_a.py", "benchmarks", "test_z.py")
    listed = [line for line in result.outlines if "::" in line]
    assert (listed[0], listed[-1], len(listed)) == ("test_a.py::test_a", "test_z.py::test_z", 9)


def test_a_rotation_never_loads_a_model_twice(pytester: pytest.Pytester) -> None:
    copy_benchmarks(pytester.path, "dse")
    names = [case.id for case in dse_cases(default_options(quantization="none,q4f32_1,q0f32"))]
    formats = [names[:6], names[6:12], names[12:]]
    seen = set()
    for _ in range(12):  # six first cases are possible: all runs begin with the same one once in 6^11
        result = pytester.runpytest_inprocess(
            "--collect-only", "-p", "no:warnings", "--kv-quantization=none,q4f32_1,q0f32"
        )
        seed = int(re.search(r"order seed (\d+)", result.stdout.str())[1])
        ids = re.findall(r"<Function test_dse\[(.*)\]>", result.stdout.str())
        assert ids == [name for chosen in rotated(formats, seed) for name in rotated(chosen, seed)]
        seen.add(ids[0])
        if len(seen) > 1:
            return
    pytest.fail(f"{seen} is always first")


def test_k_selects_by_suite_format_and_axis(pytester: pytest.Pytester) -> None:
    copy_benchmarks(pytester.path, "compression", "dse")
    assert len(collected(pytester, "-k", "dse and q4f16")) == 6
    assert collected(pytester, "-k", "dse and none and ctx512 and bs04") == ["nano-none-ctx512-pc128-bs04-swoff-sink0"]
    full = collected(pytester, "-k", "dse and ctx8192 and bs04", "--kv-dse", "--kv-quantization=q4f16_1")
    assert len(full) == 3 * 3 * 5
    assert all("-ctx8192-" in one and "-bs04-" in one for one in full)
