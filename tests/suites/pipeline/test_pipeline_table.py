"""The console table of the pipeline suite: an SLO that nobody meets is told, for then goodput compares nothing."""

from __future__ import annotations

import re
from typing import Any

from pipeline_rows import pipeline_row

from kvsuite.console import console_text
from kvsuite.options.resolve import default_options
from kvsuite.suites.pipeline.cases import pipeline_cases
from kvsuite.suites.pipeline.figures.arms import groups_of
from kvsuite.suites.pipeline.results_json import results_json
from kvsuite.suites.pipeline.rows import baseline_for
from kvsuite.suites.pipeline.table import pipeline_table


def shares(row: dict[str, Any], share: float) -> dict[str, Any]:
    metrics = row["metrics"] | {"slo_share": {"value": share}, "goodput_req_s": {"value": share}}
    return row | {"metrics": metrics}


def said(*rows: dict[str, Any]) -> str:
    return " ".join(console_text(pipeline_table(rows)).split())


def test_an_slo_that_no_request_of_any_case_meets_is_a_line_with_what_was_reached() -> None:
    baseline, less = pipeline_row(), pipeline_row("compression-only", factor=5.0)
    found = said(shares(baseline, 0.0), shares(less, 0.0))
    line = "synthetic-long, 8 requests: none of any case meets the SLO 1s:25ms (lowest medians: TTFT "
    assert found.count(line) == 1
    assert re.search(r"TPOT [\d.]+ s\), so goodput tells no case from another; give a --kv-slo", found)
    # one request of one case is enough to tell cases apart
    assert line not in said(shares(baseline, 0.0), shares(less, 0.125))


def test_a_workload_whose_cases_failed_says_nothing_of_an_slo() -> None:
    assert "none of any case" not in said(pipeline_row(status="failed", error={"type": "RuntimeError", "message": "x"}))


def test_table_and_figures_say_when_requests_came() -> None:
    """Of real cases: rows that a test makes up could have the arrivals where no case has them."""
    for typed, words in (
        ({}, "arrivals closed"),
        ({"concurrency": "4"}, "arrivals closed, 4 under way"),
        ({"arrival_rate": "2"}, "arrivals poisson at 2 a second"),
        ({"trace_time_scale": "3"}, "arrivals trace, 3 times as fast"),
    ):
        case = pipeline_cases(default_options(device="cpu", **typed))[0].to_dict()
        row = pipeline_row() | {"case": case}
        assert f"{words}, pool of 20 blocks" in said(row)
        assert f"|  {words}  |" in groups_of([row])[0].title


def test_capacity_is_a_column_where_a_case_has_been_asked_for_it() -> None:
    baseline, less = pipeline_row(), pipeline_row("compression-only", factor=5.0)
    assert "Capacity(req/s)" not in said(baseline, less)
    never = {"value": None, "reason": "no rate is good: 2 requests a second never drains"}
    asked = [
        row | {"metrics": row["metrics"] | {"capacity_req_s": entry}}
        for row, entry in ((baseline, never), (less, {"value": 3.25}))
    ]
    asked[1]["samples"]["capacity"] = [{"rate": 3.25, "share": 1.0, "drains": True}]
    listed = results_json({}, asked)
    assert [one["capacity_req_s"] for one in listed] == [None, 3.25]
    assert ["capacity_rates" in one for one in listed] == [False, True]
    found = said(*asked)
    assert "Capacity(req/s)" in found
    assert " 3.25 " in found
    assert "Capacity: no rate is good: 2 requests a second never drains (synthetic-long-bs08-baseline)" in found


def test_shares_of_sms_are_those_that_were_given_where_counts_or_a_controller_asked() -> None:
    counts = pipeline_row("greenctx-only", partition=(32, 96), factor=5.0)
    by_share = {str(share): {"decode_sms": 0, "prompt_sms": 0, "device_sms": 132} for share in (0.2, 0.25)}
    applied: list[dict[str, int] | None] = [
        None, {"decode_sms": 104, "prompt_sms": 24}, {"decode_sms": 96, "prompt_sms": 32}, None,
    ]  # fmt: skip
    decisions = [
        {"time_s": float(at), "inputs": {}, "decision": {"pipeline": "prefill"}, "applied": {"partition": one}}
        for at, one in enumerate(applied)
    ]
    triad = pipeline_row("triad", factor=5.0, decisions=[*decisions, {"time_s": 9.0, "inputs": {}, "phase": "decode"}])
    triad["partition"] = {"requested": None, "realised": {"provider": "cuda driver", "by_share": by_share}}
    never = pipeline_row("triad", factor=5.0, decisions=decisions[:1])
    never["partition"] = triad["partition"]
    skipped = pipeline_row("greenctx-only", partition=(32, 96), factor=5.0, status="skipped", error={"message": "none"})
    found = [
        (one["greenctx_compress_ratio"], one["greenctx_main_ratio"])
        for one in results_json({}, [counts, triad, never, skipped])
    ]
    assert found == [(0.7273, 0.2424), (0.2424, 0.7273), (None, None), (None, None)]


def test_the_baseline_of_a_resumed_run_is_the_one_that_was_measured_again() -> None:
    failed = pipeline_row(status="oom", error={"message": "out of memory"})
    less, again = pipeline_row("compression-only", factor=5.0), pipeline_row()
    assert baseline_for(less, [failed, less, again]) is again
    assert baseline_for(less, [failed, less]) is failed


def test_prompts_with_an_image_are_compared_with_their_own_baseline_and_say_so() -> None:
    def seeing(row: dict[str, Any]) -> dict[str, Any]:
        workload = row["case"]["workload"] | {"image": "photo.png"}
        image = {"source": "photo.png", "tokens": 576, "size": 336}
        return row | {"case": row["case"] | {"workload": workload}, "dataset": {"image": image}}

    rows = [pipeline_row(), seeing(pipeline_row()), seeing(pipeline_row("compression-only", factor=5.0))]
    assert baseline_for(rows[2], rows) is rows[1]
    found = said(*rows)
    assert "synthetic-long, one image each, 8 requests of up to" in found
    assert "synthetic-long, 8 requests of up to" in found
    text, baseline, compressed = results_json({}, rows)
    assert [row["image_tokens"] for row in (baseline, compressed)] == [576, 576]
    assert not text.keys() & {"image", "image_tokens"}, "rows of text are what they were"
