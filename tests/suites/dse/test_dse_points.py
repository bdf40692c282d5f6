from __future__ import annotations

import pytest
from dse_samples import Q4, changed, own_sheets, record, sheet

from kvsuite.suites.dse.csv_files import CsvSheet
from kvsuite.suites.dse.figures.points import (
    QuantityReading,
    Spread,
    blocks,
    memory_column,
    model_of,
    samples_of,
    source_of,
    spreads,
    written,
)


def test_a_second_block_of_a_point_is_another_sample() -> None:
    (first, *_) = blocks(sheet("metrics").rows)
    assert len(first) == 22
    again = [row | {"metric_value": 1.0} for row in first]
    found = samples_of(CsvSheet(sheet("metrics").table, Q4, "x", [*first, *again]))
    assert [sample.readings["decode_tok_s"].values[0] == 1.0 for sample in found] == [False, True]
    (spread,) = spreads(found, "decode_tok_s").values()
    assert (spread.low, spread.count) == (1.0, 2)


def test_a_row_is_a_sample() -> None:
    (sample, *_) = samples_of(sheet("results"))
    assert sample.settings == (4096, 1024, 1, -1, 0)
    assert not sample.own
    assert sample.readings["kvcache_mb"] == QuantityReading((722.068,), 1)
    assert sample.readings["total_mb"] == QuantityReading((5472.212,), 1)
    assert "e2e_s" not in sample.readings
    row = sheet("results").rows[0]
    assert sample.readings["chars_s"].values == (row["approx_chars"] / row["time_s"],)


def test_a_row_of_ours_brings_its_range() -> None:
    sample = samples_of(own_sheets([record()])[1])[0]
    reading = sample.readings["decode_tok_s"]
    assert reading.measurements == 3
    low, middle, high = reading.values
    assert low < middle < high
    assert Spread.of([reading]) == Spread(middle, low, high, 3)


def test_measured_memory_is_drawn_before_an_estimate() -> None:
    rows = own_sheets([record()])[0].rows
    assert memory_column(rows, "total_mb") == "mem_measured_peak_mb"
    assert memory_column(sheet("results").rows, "total_mb") == "gpu_mem_total_mb"
    none = changed(own_sheets([record()])[0], mem_measured_peak_mb=None).rows
    assert memory_column(none, "total_mb") == "mem_predicted_total_mb"
    assert memory_column([], "total_mb") is None


def test_a_number_comes_from_one_kind_of_file() -> None:
    results, metrics = (samples_of(own_sheets([record()])[place]) for place in (0, 1))
    assert source_of(results, metrics, "SmolLM2-q4f16_1", "ttft_s") == metrics
    assert source_of(results, metrics, "SmolLM2-q4f16_1", "total_mb") == results
    assert source_of(results, metrics, "other", "total_mb") == []


def test_settings_as_words() -> None:
    assert written("sliding_window_size", -1) == "off"
    assert written("sliding_window_size", 2048) == "2 048"
    assert written("attention_sink_size", 0) == "0"


@pytest.mark.parametrize(
    ("model", "quantization", "engine", "found"),
    [
        ("HF://mlc-ai/Llama-3-8B-q4f16_1-MLC", "q4f16_1", "mlc", "Llama-3-8B-MLC"),
        # of a model that is called after a format of its own the name stays whole
        ("org/tiny-q4f16_1", "none", "nano", "tiny-q4f16_1"),
        ("smollm2", "q4f32_1", "nano", "smollm2"),
        ("HF://mlc-ai/Llama-3-8B-q4f16_1-MLC", None, None, "Llama-3-8B-MLC"),
    ],
)
def test_the_weight_format_is_a_field_where_the_row_has_one(
    model: str, quantization: str | None, engine: str | None, found: str
) -> None:
    assert model_of({"model": model, "quantization": quantization, "engine": engine}) == found
