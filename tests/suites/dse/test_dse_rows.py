from __future__ import annotations

from typing import Any

import pytest
from dse_samples import MIB, RUN, record

from kvsuite.metrics.registry import MetricRegistry
from kvsuite.suites.dse.columns import METRICS, RESULTS
from kvsuite.suites.dse.rows import axis_value, csv_rows, metric_rows


def test_a_row_a_round_with_its_own_times() -> None:
    rows = csv_rows(RUN, [record(context=512, chunk=128, batch=4, window=64, sink=8)])
    assert [row["run_id"] for row in rows] == [1, 2, 3]
    assert all(tuple(row) == RESULTS.columns for row in rows)
    first = rows[0]
    assert (first["context_window_size"], first["prefill_chunk_size"], first["max_batch_size"]) == (512, 128, 4)
    assert (first["sliding_window_size"], first["attention_sink_size"]) == (64, 8)
    assert (first["num_runs"], first["max_tokens"], first["model"], first["device"]) == (3, 32, "SmolLM2", "cuda:0")
    tpot = (70 * MIB + 4 * 64 * 3 * 2**10) / 2e10
    assert [row["tpot_s"] / tpot for row in rows] == pytest.approx([0.99, 1.0, 1.02])
    assert [row["decode_tok_s"] for row in rows] == pytest.approx([4 / tpot / r for r in (0.99, 1.0, 1.02)])
    assert [row["floor_share"] for row in rows] == pytest.approx([0.5 / r for r in (0.99, 1.0, 1.02)])
    assert [row["approx_chars"] for row in rows] == [150, 151, 152]
    assert first["time_s"] == pytest.approx(0.99 * (first["ttft_s"] / 0.99 + 31 * tpot))


def test_decode_speed_is_that_of_steps_in_which_all_decode() -> None:
    """What a token of one request takes holds the prompts of the others, and fell with the batch in the figures."""
    of, entry = record(batch=4), MetricRegistry().value
    of["metrics"]["decode_step_s"] = entry("decode_step_s", [0.1, 0.1, 0.1])
    of["metrics"]["decode_tok_s_batch"] = entry("decode_tok_s_batch", [40.0, 41.0, 42.0])
    rows = csv_rows(RUN, [of])
    assert [row["decode_tok_s"] for row in rows] == [40.0, 41.0, 42.0]
    assert rows[0]["floor_share"] == pytest.approx(of["metrics"]["tpot_floor_s"]["value"] / 0.1)
    assert by_name(metric_rows(RUN, [of]))["decode_tokens_per_s"]["metric_value"] == 41.0


def test_three_kinds_of_memory_are_apart() -> None:
    (row, *_) = csv_rows(RUN, [record()])
    kv = 256 * 3 * 2**10 / MIB
    assert row["gpu_mem_kvcache_mb"] == row["mem_predicted_kvcache_mb"] == row["mem_measured_kvcache_mb"] == kv
    assert row["gpu_mem_total_mb"] is None  # the engine does not say
    assert row["mem_predicted_params_mb"] == row["mem_measured_params_mb"] == 70
    assert row["mem_measured_peak_mb"] == row["mem_predicted_total_mb"] == 70 + kv + 0.25
    assert row["kv_exact_mb"] == kv


def test_what_an_mlc_record_says_goes_into_the_originals_columns() -> None:
    reported = {f"{part}_bytes": value * MIB for part, value in
                (("total", 5472.212), ("params", 4308.133), ("kvcache", 722.068), ("temp", 442.011))}  # fmt: skip
    (row, *_) = csv_rows(RUN, [record(memory={"predicted": {}, "reported": reported, "measured": {}})])
    found = [row[f"gpu_mem_{part}_mb"] for part in ("total", "params", "kvcache", "temp")]
    assert found == pytest.approx([5472.212, 4308.133, 722.068, 442.011])
    assert row["mem_predicted_total_mb"] is None


def test_inert_axes_and_provenance() -> None:
    (row, *_) = csv_rows(RUN, [record()])
    assert row["inert_axes"] == {"attention_sink_size": "no window"}
    assert row["sliding_window_size"] == -1
    assert (row["kvsuite_run_id"], row["host"], row["device_name"], row["driver"]) == (
        "20261120_101500", "box", "H200", "580.1",
    )  # fmt: skip
    assert (row["git_commit"], row["torch_version"], row["schema_version"]) == ("abc", "2.11.0", 1)


def test_a_case_without_a_result_has_one_row_that_says_why() -> None:
    failed = record(status="oom", metrics={}, error={"type": "OutOfMemoryError", "message": "too much"}, rounds=0)
    (row,) = csv_rows(RUN, [failed])
    assert (row["run_id"], row["status"], row["time_s"]) == (0, "oom", None)
    assert row["reason"] == "oom: OutOfMemoryError: too much"
    assert metric_rows(RUN, [failed]) == []


def test_other_suites_have_no_row() -> None:
    assert csv_rows(RUN, [record(suite="compression")]) == []
    assert metric_rows(RUN, [record(suite="compression")]) == []


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({row["metric_name"] for row in rows}) == len(rows)
    return {row["metric_name"]: row for row in rows}


def test_metrics_by_the_originals_names_and_by_their_own() -> None:
    rows = metric_rows(RUN, [record(batch=4)])
    assert all(tuple(row) == METRICS.columns for row in rows)
    found = by_name(rows)
    decode = found["decode_tokens_per_s"]
    assert decode["metric_value"] == found["decode_tok_s_agg"]["metric_value"]
    assert (decode["samples"], decode["unit"]) == (3, "tok/s")
    assert decode["smallest"] < decode["metric_value"] < decode["largest"]
    assert found["prompt_tokens_sum"]["metric_value"] == found["prefill_tokens_sum"]["metric_value"] == 512
    assert found["completion_tokens_sum"]["metric_value"] == 128
    assert found["perplexity"]["metric_value"] == 18.0
    assert found["last_finished_request_ttft_s"]["quantization"] == "q4f16_1"


def test_an_engines_own_metrics_keep_their_names() -> None:
    printed = {"decode_time_by_batch_size_count{batch_size=4}": 380, "decode_tokens_per_s": 7.5}
    found = by_name(metric_rows(RUN, [record(samples={"engine_metrics": printed})]))
    assert found["decode_tokens_per_s"]["metric_value"] == 7.5
    assert found["decode_time_by_batch_size_count{batch_size=4}"]["metric_value"] == 380
    assert "prompt_tokens_sum" not in found
    assert "tpot_s" in found


def test_a_metric_without_a_value_has_no_row() -> None:
    row = record()
    row["metrics"]["perplexity"] = {"value": None, "reason": "random weights"}
    assert "perplexity" not in by_name(metric_rows(RUN, [row]))
    assert csv_rows(RUN, [row])[0]["perplexity"] is None


@pytest.mark.parametrize(("value", "found"), [(None, -1), (0, -1), (-1, -1), (64, 64)])
def test_a_window_that_is_off(value: int | None, found: int) -> None:
    assert axis_value({"window": value}, "sliding_window_size") == found
    assert axis_value({"sliding_window_size": value}, "sliding_window_size") == found


def test_a_case_without_an_axis_is_a_fault_of_the_program() -> None:
    with pytest.raises(ValueError, match="no batch among its params"):
        axis_value({"context": 4}, "max_batch_size")
