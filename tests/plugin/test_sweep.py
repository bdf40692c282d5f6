"""One sweep, run plainly and on two workers of xdist: two of its policies fail, and a user's hooks are on."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import TINY_NAMES, Run, rotated

from kvsuite.commands.report import run as redraw
from kvsuite.store.validate import validate

NAMES = [*TINY_NAMES, "broken", "hungry"]
EXACT = ("kv_bytes_exact", "kv_bytes_exact_prefill", "cache_tokens_mean", "cache_tokens_min", "cache_tokens_max")


@pytest.fixture(params=["plain", "xdist"])
def sweep(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run


def test_the_sweep_goes_on_and_the_run_fails(sweep: Run) -> None:
    assert sweep.code == pytest.ExitCode.TESTS_FAILED
    assert sweep.said("2 failed, 5 passed")
    assert not sweep.said("INTERNALERROR")
    assert not sweep.said("Traceback")
    statuses = {name: row["status"] for name, row in sweep.rows().items()}
    assert statuses == dict.fromkeys(TINY_NAMES, "ok") | {"broken": "error", "hungry": "oom"}


def test_every_row_is_valid(sweep: Run) -> None:
    run, *rows = sweep.lines()
    validate("run", run, "run line")
    for row in rows:
        validate("record", row, row["id"])
        assert row["env"] == run["env"]
    assert {row["id"] for row in rows} == {
        f"benchmarks/test_compression.py::test_compression[hf-{name}]" for name in NAMES
    }


def test_a_failed_case_says_why(sweep: Run) -> None:
    rows = sweep.rows()
    error, oom = rows["broken"]["error"], rows["hungry"]["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "no token deserves to stay")
    assert error["phase"] == "memory"
    assert error["traceback"].splitlines()[-1] == "RuntimeError: no token deserves to stay"
    assert (oom["type"], oom["message"]) == ("OutOfMemoryError", "tried to allocate 20.00 GiB")
    assert sweep.said("error in memory: no token deserves to stay")
    assert sweep.said("oom in memory: tried to allocate 20.00 GiB")
    assert "ttft_s" not in rows["broken"]["metrics"]


def test_junit_names_the_failures_and_holds_no_records(sweep: Run) -> None:
    text = (sweep.folder / "junit.xml").read_text()
    cases = {case.get("name"): case for case in ElementTree.fromstring(text).iter("testcase")}
    assert set(cases) == {f"test_compression[hf-{name}]" for name in NAMES}
    failed = {
        name: case.find("failure").get("message") for name, case in cases.items() if case.find("failure") is not None
    }
    assert failed == {
        "test_compression[hf-broken]": "Failed: error in memory: no token deserves to stay",
        "test_compression[hf-hungry]": "Failed: oom in memory: tried to allocate 20.00 GiB",
    }
    assert "case_key" not in text
    assert "properties" not in text


def test_order_is_rotated_by_the_stored_seed(sweep: Run) -> None:
    rows = sweep.rows()
    (seed,) = {row["order_seed"] for row in rows.values()}
    assert sorted(rows, key=lambda name: rows[name]["order_index"]) == rotated(NAMES, seed)
    assert sorted(rows, key=lambda name: rows[name]["case_index"]) == NAMES


def test_derived_files_are_in_the_order_of_the_space(sweep: Run) -> None:
    report = json.loads((sweep.report / "report.json").read_text())
    assert [row["case"]["name"] for row in report["records"]] == NAMES
    results = json.loads((sweep.report / "results.json").read_text())
    assert list(results["aggregated_stats"]) == TINY_NAMES
    assert list(results["failed"]) == ["broken", "hungry"]
    table = (sweep.report / "table.txt").read_text()
    places = [table.index(f"\n{name} ") for name in NAMES]
    assert places == sorted(places)
    assert table.strip() in sweep.out, "the terminal shows the table"
    validate("report", report, "report.json")
    assert report["counts"] == {"ok": 5, "oom": 1, "error": 1, "crashed": 0, "invalid": 0, "skipped": 0}


def test_progress_tells_how_many_and_how_long(sweep: Run) -> None:
    lines = [line[line.index("[") :] for line in sweep.out.splitlines() if " elapsed, " in line]
    assert [line.partition("]")[0] for line in lines] == [f"[{done}/7" for done in range(1, 8)]
    assert all(" left" in line for line in lines[:-1])
    assert lines[-1].endswith("done")
    assert [line.split()[1].rstrip(":") for line in lines] == list(sweep.rows()), "a row is written when its case ends"


def test_the_command_is_what_was_typed_under_xdist_too(xdist: Run) -> None:
    (run,) = (line for line in xdist.lines() if line["schema"] == "kvsuite.run/1")
    assert run["command"][0] == "pytest"
    assert "-n2" in run["command"]
    assert run["environment"]["command"] == run["command"]


def test_the_same_cases_and_bytes_with_and_without_xdist(plain: Run, xdist: Run) -> None:
    def facts(run: Run) -> dict[str, Any]:
        return {
            name: [row["id"], row["case_key"], row["settings_hash"], row["case"], row["status"]]
            + [row["metrics"].get(metric, {}).get("value") for metric in EXACT]
            for name, row in run.rows().items()
        }

    assert facts(plain) == facts(xdist)
    assert plain.rows()["streaming_6"]["metrics"]["cache_tokens_max"]["value"] == 6
    assert {row["effective"]["concurrent_workers"] for row in plain.rows().values()} == {1}
    assert {row["effective"]["concurrent_workers"] for row in xdist.rows().values()} == {2}


def test_hooks_reach_the_records(sweep: Run) -> None:
    run, *rows = sweep.lines()
    assert run["environment"]["rack"] == "b12"
    for row in rows:
        entry = row["metrics"]["joules_per_token"]
        assert (entry["value"], entry["unit"], entry["better"], entry["n"]) == (2.0, "J", "lower", 2)
        assert "fan at 30 %, dummy-tiny" in row["warnings"]


def test_hooks_reach_the_derived_files(sweep: Run) -> None:
    run, *rows = sweep.lines()
    report = json.loads((sweep.report / "report.json").read_text())
    assert report["environment"]["rack"] == "b12"
    assert report["run"]["campaign"] == "november"
    assert report["records"][0]["reviewed"] is True
    assert (sweep.report / "mine.txt").read_text() == " ".join(NAMES)
    assert (sweep.report / "benchmark_comparison.png").exists(), "a user's figure does not replace ours"
    # the truth stays what was measured
    assert "campaign" not in run
    assert all("reviewed" not in row for row in rows)


def test_what_a_hook_changed_in_the_report_survives_a_redraw(sweep: Run, tmp_path: Path) -> None:
    # nothing of the hook is in records.jsonl, so that the redrawn report is the measured one
    import argparse

    assert redraw(argparse.Namespace(path=sweep.report, out=tmp_path)) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    first = json.loads((sweep.report / "report.json").read_text())
    del first["run"]["campaign"], first["records"][0]["reviewed"]
    assert again == first
    assert (tmp_path / "table.txt").read_text() == (sweep.report / "table.txt").read_text()
