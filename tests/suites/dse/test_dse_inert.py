from __future__ import annotations

from typing import Any

import pytest
from dse_samples import Q0, Q4, changed, own_sheets, record, records, sheet

from kvsuite.suites.dse.columns import AXES
from kvsuite.suites.dse.csv_files import CsvSheet
from kvsuite.suites.dse.figures.inert import verdicts
from kvsuite.suites.dse.figures.points import Sample, samples_of

SPEED = ("prefill_tok_s", "decode_tok_s", "e2e_s", "ttft_s")


def states(samples: list[Sample], name: str) -> dict[str, str]:
    return {axis: verdict.state for axis, verdict in verdicts(samples, name).items()}


def scaled(found: CsvSheet, metric: str, factor: Any) -> CsvSheet:
    """The sheet with a metric multiplied by a function of the row."""
    rows = [
        row | {"metric_value": row["metric_value"] * factor(row)} if row["metric_name"] == metric else row
        for row in found.rows
    ]
    return CsvSheet(found.table, found.tag, found.source, rows)


@pytest.mark.parametrize("name", SPEED)
def test_no_axis_of_the_original_ever_reached_a_time(name: str) -> None:
    assert set(states(samples_of(sheet("metrics")), name).values()) == {"inert"}
    assert set(states(samples_of(sheet("metrics", Q0)), name).values()) <= {"inert", "fixed"}


def test_other_machines_are_not_an_axis() -> None:
    # the file's fast machine ran more of the small contexts
    verdict = verdicts(samples_of(sheet("metrics")), "decode_tok_s")["context_window_size"]
    assert verdict.state == "inert"
    assert verdict.reason == "one short prompt fills no context in the original program; the numbers move by -15.1 %"


def test_what_moves_the_engines_estimate() -> None:
    samples = samples_of(sheet("results"))
    total, kvcache = verdicts(samples, "total_mb"), verdicts(samples, "kvcache_mb")
    live = ["context_window_size", "prefill_chunk_size", "max_batch_size"]
    assert [axis for axis in AXES if total[axis].state == "live"] == live
    assert [axis for axis in AXES if kvcache[axis].state == "live"] == live[:1]
    # 88 bytes a sequence round up to the last digit now and then
    assert kvcache["max_batch_size"].reason.endswith("the numbers move by 0.001 MB")
    assert "the window never reached the engine" in total["sliding_window_size"].reason


def test_an_estimate_that_moves_along_the_window_is_believed() -> None:
    found = sheet("results")
    rows = [row | {"gpu_mem_kvcache_mb": row["gpu_mem_kvcache_mb"] / (1 + (row["sliding_window_size"] > 0))}
            for row in found.rows]  # fmt: skip
    samples = samples_of(CsvSheet(found.table, found.tag, found.source, rows))
    assert states(samples, "kvcache_mb")["sliding_window_size"] == "live"


def test_another_workload_is_not_taken_for_the_originals() -> None:
    def slower(row: Any) -> float:
        return 0.5 if row["max_batch_size"] == 8 else 1.0

    slow = scaled(sheet("metrics"), "decode_tokens_per_s", slower)
    assert states(samples_of(slow), "decode_tok_s")["max_batch_size"] == "inert"
    long = scaled(slow, "last_finished_request_prompt_tokens", lambda row: 100)
    assert states(samples_of(long), "decode_tok_s")["max_batch_size"] == "live"
    batched = [row | {"metric_name": row["metric_name"].replace("batch_size=1", "batch_size=4")} for row in slow.rows]
    found = CsvSheet(slow.table, slow.tag, slow.source, batched)
    assert states(samples_of(found), "decode_tok_s")["max_batch_size"] == "live"


def test_a_change_within_the_repeats_is_none() -> None:
    long = scaled(sheet("metrics"), "last_finished_request_prompt_tokens", lambda row: 100)
    assert states(samples_of(long), "decode_tok_s")["max_batch_size"] == "inert"
    assert states(samples_of(long), "decode_tok_s")["prefill_chunk_size"] == "inert"


def test_the_window_of_another_family_is_judged_by_its_numbers() -> None:
    found = scaled(sheet("metrics"), "decode_tokens_per_s", lambda row: 2 if row["sliding_window_size"] > 0 else 1)
    other = CsvSheet(found.table, "gemma-q4f16_1-MLC", found.source, found.rows)
    assert states(samples_of(found), "decode_tok_s")["sliding_window_size"] == "inert"
    assert states(samples_of(other), "decode_tok_s")["sliding_window_size"] == "live"


def test_our_rows_say_it_themselves() -> None:
    results = samples_of(own_sheets()[1])
    # its sink is inert where there is no window, which is no comparison
    assert set(states(results, "kvcache_mb").values()) == {"live"}
    dead = [record(window=window, inert={"window": "a full cache"}) for window in (None, 64, 128)]
    (found, _) = own_sheets(dead)
    verdict = verdicts(samples_of(found), "kvcache_mb")
    assert verdict["sliding_window_size"].state == "inert"
    assert verdict["sliding_window_size"].reason == "a full cache"
    assert verdict["max_batch_size"].state == "fixed"


def test_prefix_cache_hits_are_another_condition() -> None:
    samples = samples_of(sheet("metrics"))
    assert {(s.condition.num_runs, s.condition.cached) for s in samples} == {(1, False), (3, True)}
    unknown = [row for row in sheet("metrics").rows if "prompt" not in row["metric_name"]]
    found = samples_of(CsvSheet(sheet("metrics").table, Q4, "x", unknown))
    assert {sample.condition.cached for sample in found} == {None}


def test_failed_points_are_no_samples() -> None:
    assert samples_of(changed(sheet("results"), status="oom")) == []
    assert len(records()) == 80
