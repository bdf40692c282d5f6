"""Which layers are lowered: the cheapest for a saved byte first, no more than the budget asks for, and never beyond it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache_formats.by_layer import ByLayerFormat
from kvsuite.cache_formats.cache_format import CacheFormat, SideFormat
from kvsuite.memory_model.config import architecture_of
from kvsuite.models.layers import ModelLayers
from kvsuite.suites.sensitivity.assignment import KEYS, PLAIN, VALUES, Assignment, TextBytes, lowerings, mixed

INT8, INT4, FINE = SideFormat("int8"), SideFormat("int4"), SideFormat("int4", group=8)


def layers() -> ModelLayers:
    found = architecture_of("dummy:tiny").cache
    assert not isinstance(found, str)
    return found


SIZE = TextBytes(layers(), 64, 4)
COUNT = len(layers().layers)
BASE = Assignment.uniform(COUNT, INT8, INT8)


def test_all_alike_is_the_format_itself_and_none_is_none() -> None:
    assert Assignment.uniform(3).format is None
    assert Assignment.uniform(3, INT8, INT4).format == CacheFormat(INT8, INT4)
    mixed_format = Assignment.uniform(3).lowered((VALUES, 1, INT4)).format
    assert mixed_format == ByLayerFormat((None, CacheFormat(PLAIN, INT4), None))


def test_bytes_and_bits_are_those_of_the_formats() -> None:
    [heads] = {layer.kv_heads for layer in layers().layers}
    width = layers().layers[0].key_dim
    assert SIZE(BASE) == 64 * COUNT * heads * 2 * (width + 2)
    assert SIZE.bits(SIZE(BASE)) == 8 + 16 / width
    assert SIZE.budget(25, "share") == SIZE.budget(8, "bits") == 64 * COUNT * heads * 2 * width


def test_the_cheapest_goes_first_and_no_more_go_than_the_budget_asks_for() -> None:
    prices = {lowering: float(rank + 1) for rank, lowering in enumerate(lowerings(layers(), [(INT4, INT4)]))}
    saved = SIZE.layer(0, BASE) - SIZE.layer(0, BASE.lowered((KEYS, 0, INT4)))
    for count in range(1, 2 * COUNT + 1):
        found = mixed(BASE, prices, SIZE, SIZE(BASE) - (count - 0.5) * saved)
        assert found is not None
        lowered = [one for one in prices if found.side(one[0])[one[1]] == INT4]
        assert lowered == list(prices)[:count]
    assert mixed(BASE, prices, SIZE, SIZE(BASE)) == BASE


def test_a_larger_divergence_for_more_saved_bytes_goes_first_where_a_byte_costs_less() -> None:
    """int4 saves more than int4 in groups of 8; of two steps of one side the second costs what it adds."""
    prices = {(KEYS, 0, FINE): 1.0, (KEYS, 0, INT4): 1.1, (VALUES, 0, FINE): 1.05}
    one = SIZE.layer(0, BASE) - SIZE.layer(0, BASE.lowered((KEYS, 0, FINE)))
    assert mixed(BASE, prices, SIZE, SIZE(BASE) - 1) == BASE.lowered((KEYS, 0, INT4))
    two = {(KEYS, 0, FINE): 1.0, (KEYS, 0, INT4): 9.0, (VALUES, 0, FINE): 1.05}
    assert mixed(BASE, two, SIZE, SIZE(BASE) - one - 1) == BASE.lowered((KEYS, 0, FINE)).lowered((VALUES, 0, FINE))
    assert mixed(BASE, two, SIZE, SIZE(BASE) - 2 * one - 1) == BASE.lowered((KEYS, 0, INT4)).lowered((VALUES, 0, FINE))


def test_a_budget_below_the_smallest_formats_has_no_assignment() -> None:
    prices = dict.fromkeys(lowerings(layers(), [(INT4, INT4)]), 1.0)
    least = SIZE(Assignment.uniform(COUNT, INT4, INT4))
    assert mixed(BASE, prices, SIZE, least) == Assignment.uniform(COUNT, INT4, INT4)
    assert mixed(BASE, prices, SIZE, least - 1) is None


@settings(max_examples=60)
@given(st.lists(st.floats(1e-6, 1), min_size=4 * COUNT, max_size=4 * COUNT), st.floats(0.7, 0.99))
def test_within_the_budget_and_the_last_step_was_needed(prices: list[float], share: float) -> None:
    known = dict(zip(lowerings(layers(), [(INT4, INT4), (FINE, FINE)]), prices, strict=True))
    found = mixed(BASE, known, SIZE, share * SIZE(BASE))
    assert found is not None
    most_saved = SIZE.layer(0, BASE) - SIZE.layer(0, BASE.lowered((KEYS, 0, INT4)))
    assert share * SIZE(BASE) - most_saved < SIZE(found) <= share * SIZE(BASE)


@pytest.mark.parametrize("side", [KEYS, VALUES])
def test_a_lowering_changes_one_side_of_one_layer(side: str) -> None:
    found = BASE.lowered((side, 1, INT4))
    other = VALUES if side == KEYS else KEYS
    assert found.side(other) == BASE.side(other)
    assert [index for index in range(COUNT) if found.side(side)[index] != INT8] == [1]
