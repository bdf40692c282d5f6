from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.metrics.metric import SHOWN_FIELDS
from kvsuite.metrics.registry import ALIASES, BUILTIN, Metric, MetricRegistry, metric_of, percentile, summarise
from kvsuite.record import metric_value

REGISTRY = MetricRegistry()
NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


def test_a_metric_is_defined_once() -> None:
    names = [metric.name for metric in BUILTIN]
    assert len(set(names)) == len(names)
    registry = MetricRegistry()
    mine = Metric("mine_s", "s", "lower", "timed", "something")
    registry.add(mine)
    registry.add(Metric("mine_s", "s", "lower", "timed", "something"))
    with pytest.raises(ValueError, match="metric 'mine_s' is already defined as: something"):
        registry.add(Metric("mine_s", "s", "higher", "timed", "something"))
    assert registry["mine_s"] is mine
    assert "mine_s" not in {metric.name for metric in MetricRegistry()}


def test_units_are_the_suffix() -> None:
    for metric in BUILTIN:
        for suffix, unit in (("_tok_s", "tok/s"), ("_req_s", "req/s"), ("_bytes", "bytes")):
            if metric.name.endswith(suffix):
                assert metric.unit == unit, metric.name
        if metric.name.endswith("_s") and not metric.name.endswith("_req_s") and "tok_s" not in metric.name:
            assert metric.unit == "s", metric.name
        assert metric.formula


def test_aliases_lead_to_metrics() -> None:
    for alias, name in ALIASES.items():
        assert REGISTRY[alias] is REGISTRY[name]
    assert REGISTRY.value("ttft", 0.5)["unit"] == "s"
    with pytest.raises(KeyError, match="unknown metric 'speed'; known: bits_per_byte, "):
        _ = REGISTRY["speed"]


@pytest.mark.parametrize("samples", [None, [], math.nan, math.inf, [1.0, math.nan], [1.0, -math.inf]])
def test_a_missing_number_needs_a_reason(samples: Any) -> None:
    with pytest.raises(ValueError, match="metric tpot_s: a value that is missing or not finite needs a reason"):
        REGISTRY.value("tpot_s", samples)
    with pytest.raises(ValueError, match="needs a reason"):
        REGISTRY.value("tpot_s", samples, reason="")
    entry = REGISTRY.value("tpot_s", samples, reason="because", clock="scripted")
    assert (entry["value"], entry["reason"], entry["clock"]) == (None, "because", "scripted")
    json.dumps(entry, allow_nan=False)
    assert "values" not in entry


def test_an_entry_carries_its_definition() -> None:
    entry = REGISTRY.value("decode_tok_s_agg", [30.0, 10.0, 20.0], clock="perf_counter")
    metric = REGISTRY["decode_tok_s_agg"]
    assert entry["value"] == 20.0
    assert (entry["unit"], entry["better"], entry["class"], entry["version"], entry["formula"]) == (
        "tok/s", "higher", "timed", metric.version, metric.formula
    )  # fmt: skip
    assert (entry["n"], entry["values"], entry["clock"]) == (3, [30.0, 10.0, 20.0], "perf_counter")
    single = REGISTRY.value("kv_bytes_exact", 1024)
    assert (single["value"], "n" in single) == (1024, False)


@pytest.mark.parametrize(("n", "half_percent"), [(3, 2.48), (5, 1.24), (7, 0.92), (10, 0.72), (20, 0.47), (30, 0.37)])
def test_interval_at_a_cv_of_one_percent(n: int, half_percent: float) -> None:
    found = summarise(with_spread(n, mean=10.0, std=0.1))
    assert found["cv"] == pytest.approx(0.01)
    low, high = found["ci95"]
    assert (high - low) / 2 / found["mean"] * 100 == pytest.approx(half_percent, abs=0.006)
    assert (high + low) / 2 == pytest.approx(found["mean"])


def with_spread(n: int, *, mean: float, std: float) -> list[float]:
    """``n`` values of exactly this mean and sample standard deviation."""
    raw = [float(i - (n - 1) / 2) for i in range(n)]
    scale = std / math.sqrt(sum(x * x for x in raw) / (n - 1))
    return [mean + scale * x for x in raw]


def test_defect_16_repeats_have_a_spread() -> None:
    found = summarise([1.0, 2.0, 4.0])
    assert (found["n"], found["min"], found["max"], found["median"], found["values"]) == (
        3,
        1.0,
        4.0,
        2.0,
        [1.0, 2.0, 4.0],
    )
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["std"] == pytest.approx(math.sqrt(7 / 3))
    assert found["se"] == pytest.approx(math.sqrt(7 / 9))
    assert found["cv"] == pytest.approx(found["std"] / found["mean"])
    # t(0.975, 2) = 4.303
    assert found["ci95"][1] - found["mean"] == pytest.approx(4.303 * found["se"], rel=1e-3)


def test_percentiles_only_where_samples_reach_them() -> None:
    found = {n: summarise([float(i) for i in range(n)]) for n in (9, 10, 99, 100)}
    assert [found[n]["p90"] for n in (9, 10)] == [None, pytest.approx(8.1)]
    assert [found[n]["p99"] for n in (99, 100)] == [None, pytest.approx(98.01)]


def test_one_sample_is_the_sample() -> None:
    found = summarise([3.0])
    assert {found[name] for name in ("mean", "median", "min", "max")} == {3.0}
    assert found["std"] is found["cv"] is found["se"] is found["ci95"] is None
    entry = REGISTRY.value("ttft_s", [3.0])
    assert (entry["value"], entry["n"]) == (3.0, 1)


@given(values=NUMBERS)
def test_the_order_of_samples_does_not_matter(values: list[float]) -> None:
    first, second = summarise(values), summarise(sorted(values))
    for name in ("mean", "median", "min", "max", "std", "se"):
        assert first[name] == pytest.approx(second[name], rel=1e-9, abs=1e-9)


def test_a_mean_of_zero_has_no_cv() -> None:
    assert summarise([-1.0, 1.0])["cv"] is None


@pytest.mark.parametrize(("q", "least"), [(0.5, 2), (0.9, 10), (0.95, 20), (0.99, 100)])
def test_a_percentile_needs_enough_samples(q: float, least: int) -> None:
    values = [float(i) for i in range(least)]
    assert percentile(values[:-1], q) is None
    found = percentile(values, q)
    assert found is not None
    assert found == pytest.approx(q * (least - 1))
    assert found < max(values)
    assert percentile([], q) is None


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=60), q=st.sampled_from([0.5, 0.9, 0.95]))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    import numpy as np

    assert percentile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-6)


def test_metric_value_of_a_row() -> None:
    row = {
        "metrics": {"ttft_s": REGISTRY.value("ttft_s", 1.5), "tpot_s": REGISTRY.value("tpot_s", None, reason="n = 1")}
    }
    assert metric_value(row, "ttft") == metric_value(row, "ttft_s") == 1.5
    assert metric_value(row, "tpot_s") is metric_value(row, "e2e_s") is metric_value({}, "e2e_s") is None


def test_what_a_metric_is_shown_by_reaches_who_reads_the_record() -> None:
    energy = Metric(
        "joules_per_token", "J", "lower", "timed", "energy / tokens", title="Energy", label="E", format=".3f",
        group="speed", limit="+5%",
    )  # fmt: skip
    entry = json.loads(json.dumps(MetricRegistry([energy]).value("joules_per_token", [1.0, 2.0])))
    assert metric_of("joules_per_token", entry) == energy
    assert (energy.column, energy.text(1.23456), energy.line(1.23456)) == ("E(J)", "1.235", "E 1.235 J")
    # kvsuite's own are known without
    assert not set(SHOWN_FIELDS) & set(REGISTRY.value("ttft_s", 0.5))
    assert metric_of("ttft") is REGISTRY["ttft_s"]


def test_a_record_of_another_version_keeps_its_definition() -> None:
    entry = REGISTRY.value("ttft_s", 0.5) | {"formula": "t1 - t0, as it was", "version": 7}
    found = metric_of("ttft_s", entry)
    assert (found.formula, found.version, found.heading) == ("t1 - t0, as it was", 7, "TTFT")
    # in another unit it is another number
    assert metric_of("ttft_s", entry | {"unit": "ms"}).text(1.0) == "1"


@pytest.mark.parametrize("entry", [{}, {"format": ".99f"}, {"format": "{0.__class__}"}, {"shown_in": "MiB", "unit": "s"},
                                   {"group": "best", "better": 3, "class": None, "title": ["x"], "version": "1"}])  # fmt: skip
def test_looks_that_a_file_made_up_are_left_out(entry: dict[str, Any]) -> None:
    found = metric_of("mine", entry)
    assert (found.heading, found.text(0.5), found.plot_group) == (
        "mine",
        "0.5",
        "speed" if "unit" in entry else "other",
    )


def test_a_metric_that_cannot_be_shown_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'mine': 'x' is no format; write \.2f"):
        Metric("mine", "1", "lower", "timed", "f", format="x")
    with pytest.raises(ValueError, match="'mine': s cannot be shown in MiB"):
        Metric("mine", "s", "lower", "timed", "f", shown_in="MiB")


def test_numbers_in_tables_and_lines() -> None:
    assert (metric_of("kv_bytes_exact").column, metric_of("kv_bytes_exact").text(3 * 2**19)) == ("KV MiB", "1.50")
    assert (metric_of("ttft").column, metric_of("ttft").text(0.01234)) == ("TTFT(s)", "0.0123")
    assert metric_of("accuracy").text(0.4531) == "45.31%"
    lines = [
        metric_of(name).line(value) for name, value in (("ppl", 15.481), ("tpot", 0.0123), ("kv_bytes_exact", 2**20))
    ]
    assert lines == ["PPL 15.48", "TPOT 12.30 ms", "KV 1.00 MiB"]
