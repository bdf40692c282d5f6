from __future__ import annotations

import math

import pytest

from kvsuite.errors import UserError
from kvsuite.suites.compression.results_json import results_json


def test_keys_are_the_originals(run, rows):
    results = results_json(run, rows)
    assert list(results)[:4] == ["config", "raw_results", "aggregated_stats", "baseline_stats"]
    assert list(results["config"]) == [
        "model_id", "method", "num_samples", "max_tokens", "max_new_tokens", "skip_layers", "timestamp"
    ]  # fmt: skip
    for raw in results["raw_results"]:
        assert list(raw) == [
            "ttft", "tpot", "throughput", "total_time", "perplexity", "accuracy", "eval_tokens", "final_cache_size",
            "peak_vram_gb", "method", "config",
        ]  # fmt: skip
    for stats in results["aggregated_stats"].values():
        assert set(stats) == {
            "ttft", "tpot", "throughput", "perplexity", "accuracy", "peak_vram_gb", "cache_size"
        }  # fmt: skip
    assert list(results["baseline_stats"]) == ["perplexity", "accuracy", "throughput", "tpot"]
    assert list(results["aggregated_stats"]) == [row["case"]["name"] for row in rows]
    assert results["config"]["model_id"] == "smollm2"
    assert results["config"]["skip_layers"] == []


def test_perplexity_is_pooled_not_averaged(run, rows, row):
    case = row("streaming_32", texts=((250.0, 100, 40), (600.0, 200, 90)))
    results = results_json(run, [case])
    first, second = results["raw_results"]
    assert first["perplexity"] == pytest.approx(math.exp(2.5))
    assert second["perplexity"] == pytest.approx(math.exp(3.0))
    assert (first["accuracy"], second["accuracy"]) == (0.4, 0.45)
    assert (first["eval_tokens"], second["eval_tokens"]) == (100, 200)
    pooled = results["aggregated_stats"]["streaming_32"]["perplexity"]
    assert pooled == pytest.approx(math.exp(850 / 300))
    mean = (first["perplexity"] + second["perplexity"]) / 2
    assert abs(pooled - mean) > 0.5


def test_speed_comes_from_the_medians(run, row):
    results = results_json(run, [row(tpots=(0.01, 0.012, 0.05), throughput=(90.0, 95.0, 200.0))])
    for entry in [*results["raw_results"], *results["aggregated_stats"].values()]:
        assert entry["tpot"] == 0.012
        assert entry["throughput"] == 95.0
    assert results["raw_results"][0]["total_time"] == 0.6
    assert results["raw_results"][0]["config"] == {
        "policy": "streaming_llm", "start_size": 4, "positions": "original", "skip_layers": []
    }  # fmt: skip


def test_unmeasured_vram_is_null_and_measured_is_gib(run, row):
    results = results_json(run, [row("baseline"), row("streaming_32", peak_vram=3 * 2**29)])
    assert results["aggregated_stats"]["baseline"]["peak_vram_gb"] is None
    assert results["aggregated_stats"]["streaming_32"]["peak_vram_gb"] == 1.5
    assert [raw["peak_vram_gb"] for raw in results["raw_results"]] == [None, None, 1.5, 1.5]


def test_failed_cases_are_listed_apart(run, rows, row):
    rows[0] = row("baseline", status="error", error={"type": "RuntimeError", "message": "no\nluck", "traceback": ""})
    rows.append(row("streaming_128", status="oom"))
    results = results_json(run, rows)
    assert results["baseline_stats"] is None
    assert "baseline" not in results["aggregated_stats"]
    assert "streaming_128" not in {raw["method"] for raw in results["raw_results"]}
    assert results["failed"] == {
        "baseline": {"status": "error", "reason": "error: RuntimeError: no luck"},
        "streaming_128": {"status": "oom", "reason": "oom"},
    }


def test_random_weights_still_report_speed(run, row):
    results = results_json(run, [row(kind="dummy")])
    (raw,) = results["raw_results"]
    assert (raw["perplexity"], raw["accuracy"], raw["eval_tokens"]) == (None, None, 0)
    assert raw["tpot"] == 0.011


@pytest.mark.parametrize(("typed", "layers"), [("none", []), ("0,1", [0, 1]), ([0, 1], [0, 1]), (None, [])])
def test_skip_layers_are_a_list(run, rows, typed, layers):
    run["options"]["skip_layers"] = typed
    assert results_json(run, rows)["config"]["skip_layers"] == layers


def test_same_name_on_two_engines_stays_two(run, row):
    results = results_json(run, [row("streaming_32", engine="hf"), row("streaming_32", engine="nano")])
    assert list(results["aggregated_stats"]) == ["hf-streaming_32", "nano-streaming_32"]


def test_empty_selection_is_refused(run, row):
    with pytest.raises(UserError, match="no compression case among the 1 records"):
        results_json(run, [row(suite="dse")])
