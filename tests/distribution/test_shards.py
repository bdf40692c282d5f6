"""Shards are a partition, the same everywhere, and about equally dear."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_rows import case

from kvsuite.distribution.cost import SPEEDS, Work, seconds, units, work_of
from kvsuite.distribution.plan import plan
from kvsuite.distribution.recorded import RecordedCase
from kvsuite.distribution.shards import assign
from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.options.resolve import default_options
from kvsuite.options.shard import Shard
from kvsuite.suites.compression.cases import compression_cases
from kvsuite.suites.dse.cases import dse_cases
from kvsuite.suites.perplexity.cases import perplexity_cases
from kvsuite.survival.resume import planned_key

COSTS = st.lists(st.floats(0, 1e12), max_size=60)


@given(COSTS, st.integers(1, 20))
def test_every_case_is_in_one_shard_and_none_is_too_dear(costs: list[float], parts: int) -> None:
    chosen = assign(costs, parts)
    assert len(chosen) == len(costs)
    assert set(chosen) <= set(range(1, parts + 1))
    loads = [sum(cost for cost, part in zip(costs, chosen, strict=True) if part == one) for one in range(1, parts + 1)]
    # nobody has more than all the others by more than one case
    assert max(loads) - min(loads) <= max(costs, default=0.0) * (1 + 1e-9)
    assert assign(costs, parts) == chosen


@given(st.text(max_size=12))
def test_any_text_is_a_shard_or_a_message(text: str) -> None:
    try:
        shard = Shard.parse(text)
    except UserError as error:
        message = str(error)
    else:
        assert 1 <= shard.index <= shard.of
        assert Shard.parse(str(shard)) == shard
        return
    assert message.startswith(f"--kv-shard={visible(text)}: ")


@given(st.integers(-3, 40), st.integers(-3, 40))
def test_numbers_outside_of_the_whole_are_refused(index: int, of: int) -> None:
    text = f"{index}/{of}"
    if 1 <= index <= of:
        assert Shard.parse(text) == Shard(index, of)
    else:
        with pytest.raises(UserError, match="--kv-shard"):
            Shard.parse(text)


def test_counted_work_follows_the_case() -> None:
    options = default_options(model="smollm2", device="cpu", rounds="5", num_warmup="2")
    one = case("a", model="smollm2")
    # eight passes of a prompt and four steps; 257 tokens through the cache and once at a stretch
    assert work_of(one, options) == Work(bulk=8 * 16 + 257, steps=8 * 4 + 257)
    assert work_of(case("a"), options) == Work(bulk=8 * 16, steps=8 * 4), "random weights are not scored"
    more = case("b", model="smollm2", workload=dict(one.workload) | {"prompt_tokens": 1600})
    assert units(work_of(more, options)) > units(work_of(one, options))


@pytest.mark.parametrize("cases", [compression_cases, dse_cases, perplexity_cases])
@pytest.mark.parametrize("preset", ["kvsuite", "original"])
def test_every_suite_has_a_cost(cases, preset: str) -> None:
    options = default_options(device="cpu", preset=preset)
    for one in cases(options):
        work = work_of(one, options)
        assert units(work) > 0
        for speed in SPEEDS.values():
            took = seconds(work, speed, elements=10**8, weight_bytes=4 * 10**8, loads=True)
            assert 0 < took < 1e6


def test_a_point_that_breaks_a_rule_costs_nothing_and_loading_counts_once() -> None:
    options = default_options(device="cpu", space="ctx=64;batch=1;window=off;sink=0;chunk=128")
    (broken, *_) = dse_cases(options)
    assert work_of(broken, options) == Work(0, 0)
    first, second = (
        seconds(Work(1, 1), SPEEDS["cpu"], elements=1, weight_bytes=10**9, loads=loads) for loads in (True, False)
    )
    assert first - second == pytest.approx(10**9 / SPEEDS["cpu"].load_bytes_s)


def test_packed_weights_are_unpacked_for_every_forward_on_a_cpu() -> None:
    """SmolLM2 at ctx512-pc128-bs01 with one round, seconds of one core: 15 dense and 60 packed were measured."""
    options = default_options(
        model="smollm2", device="cpu", rounds="1", num_warmup="1", space="ctx=512;chunk=128;batch=1"
    )
    work = work_of(dse_cases(options)[0], options)
    facts: dict[str, Any] = {"elements": 134_515_008, "loads": False}
    dense = seconds(work, SPEEDS["cpu"], weight_bytes=538_060_032, **facts)
    packed = seconds(work, SPEEDS["cpu"], weight_bytes=75_718_656, packed=True, **facts)
    assert 15 / 2 < dense < 15 * 2
    assert 60 / 2 < packed < 60 * 2
    # on a GPU kernels read them packed, and fewer bytes are faster
    on_gpu = [
        seconds(work, SPEEDS["cuda"], weight_bytes=size, packed=True, **facts) for size in (75_718_656, 538_060_032)
    ]
    assert on_gpu[0] < on_gpu[1]


def test_a_plan_learns_from_other_cases_of_the_same_kind() -> None:
    options = default_options(model="dummy:tiny", device="cpu")
    cases = compression_cases(options)
    plain = plan(cases, options, {})
    assert {row.source for row in plain} == {"model"}
    first = plain[0]
    assert first.seconds is not None
    known = {planned_key(first.case.to_dict()): RecordedCase(first.case, first.seconds * 10 + 100, "a run")}
    learnt = plan(cases, options, known)
    assert (learnt[0].seconds, learnt[0].source) == (first.seconds * 10 + 100, "a run")
    for before, after in zip(plain[1:], learnt[1:], strict=True):
        assert after.source == "model, corrected by 1 measured cases"
        assert after.seconds > 3 * before.seconds  # type: ignore[operator]
