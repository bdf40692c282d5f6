"""Interrupted sweeps taken up again, shards joined, a time limit, a plan: as a user starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile_policies import CONFTEST
from pytest_runs import TINY, TINY_NAMES, Run, run_pytest
from sweeps import facts, project

from kvsuite.__main__ import main
from kvsuite.store.records_file import RECORDS_FILE, read_records

COMMON = (*TINY, "-p", "no:cacheprovider", "-p", "no:benchmark")
RESUME = "--kv-resume=latest"
FAILING = (*COMMON, "--kv-method=streaming_llm,cudaerror,hungry,sleeper", "-k", "not sleeper")


def test_a_run_of_an_older_version_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    recorded = Path(__file__).parents[1] / "data" / "recorded_run"
    folder = project(tmp_path / "older")
    shutil.copytree(recorded, folder / "reports" / recorded.name)
    run = run_pytest(folder, *COMMON, f"--kv-resume={recorded.name}", "--kv-rounds=3")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    (line,) = run.said("would mix two measurements: ")
    assert "--kv-rounds: then 2, now 3; " in line
    assert "the code of kvsuite has changed (then 0.1.0 at e6239657e, now 0.1.0" in line
    assert line.endswith("measure again without --kv-resume, or go back to what the run had")
    assert run.report.joinpath(RECORDS_FILE).read_bytes() == (recorded / RECORDS_FILE).read_bytes()


def half(folder: Path, names: tuple[str, ...], tail: bytes) -> None:
    """Cut a finished run: the rows of ``names`` and half a line stay."""
    (run,) = (folder / "reports").iterdir()
    for derived in run.iterdir():
        if derived.name != RECORDS_FILE:
            derived.unlink()
    first, *lines = (run / RECORDS_FILE).read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["case"]["name"] in names]
    (run / RECORDS_FILE).write_bytes(b"".join([first, *kept]) + tail)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Everything that is measured here."""
    base = tmp_path_factory.mktemp("sweeps")
    whole = project(base / "whole")
    found = {
        "whole": run_pytest(whole, *COMMON),
        "shard 1": run_pytest(project(base / "shard1"), *COMMON, "--kv-shard=1/2"),
        "shard 2": run_pytest(project(base / "shard2"), *COMMON, "--kv-shard=2/2"),
        "empty shard": run_pytest(project(base / "empty"), *COMMON, "--kv-shard=6/6"),
        "failing": run_pytest(project(base / "failing", CONFTEST), *FAILING),
        "sleeping": run_pytest(project(base / "sleeping", CONFTEST), *FAILING, "--kv-timeout=4", "-k", "sleeper"),
        "planned": run_pytest(whole, *COMMON, "--kv-plan", "-n2"),
    }
    for name in ("cut", "other", "changed"):
        shutil.copytree(whole / "reports", project(base / name) / "reports")
        half(base / name, ("streaming_6", "baseline"), b'{"schema": "kvsuite.record/1", "id": "benchm')
    (base / "changed" / "conftest.py").write_text("# policies of mine\n")
    return found | {
        "cut": run_pytest(base / "cut", *COMMON, RESUME),
        "cut once more": run_pytest(base / "cut", *COMMON, RESUME),
        "other rounds": run_pytest(base / "other", *COMMON, RESUME, "--kv-rounds=3"),
        "changed": run_pytest(base / "changed", *COMMON, RESUME),
        "nothing yet": run_pytest(project(base / "new"), *COMMON, RESUME, "-k", "baseline"),
        "failing again": run_pytest(base / "failing", *FAILING, RESUME, "--kv-resume-rerun=none"),
        "failing oom": run_pytest(base / "failing", *FAILING, RESUME, "--kv-resume-rerun=oom"),
    }


def test_a_cut_run_is_finished_in_its_folder(runs: dict[str, Run]) -> None:
    cut, whole = runs["cut"], runs["whole"]
    assert cut.code == 0
    assert cut.said("2 cases have a record; ")
    assert cut.said("line 4 is cut off and was left out")
    assert cut.said("3 passed, 2 deselected")
    assert cut.report.name == whole.report.name, "no new folder"
    assert facts(cut.report) == facts(whole.report)
    run, rows, notes = read_records(cut.report)
    assert not notes
    assert len(run["sessions"]) == 1
    assert RESUME in run["sessions"][0]["command"]
    environments = {run["env"], run["sessions"][0]["env"]}
    assert {row["env"] for row in rows} == environments
    # each case at the place that it would have had
    (seed,) = {row["order_seed"] for row in rows}
    before = {row["id"]: row["order_index"] for row in read_records(whole.report)[1]}
    assert {row["id"]: row["order_index"] for row in rows} == before
    assert seed == run["order_seed"]


def test_a_finished_run_has_nothing_left_and_is_drawn_again(runs: dict[str, Run]) -> None:
    again = runs["cut once more"]
    assert again.code == 0
    assert again.said("5 deselected")
    assert again.said("records and figures: reports/")
    assert facts(again.report) == facts(runs["whole"].report)


def test_what_changed_is_refused_by_name(runs: dict[str, Run]) -> None:
    for name, said in (
        ("other rounds", "--kv-rounds: then 2, now 3"),
        ("changed", "the code of conftest.py has changed"),
    ):
        run = runs[name]
        assert run.code == pytest.ExitCode.USAGE_ERROR
        (line,) = run.said("would mix two measurements")
        assert said in line
        assert len(read_records(run.report)[1]) == 2, "nothing was added"


def test_latest_without_a_run_begins_one_and_says_so(runs: dict[str, Run]) -> None:
    run = runs["nothing yet"]
    assert run.code == 0
    assert run.said("no run without --kv-shard under reports/ yet, a new one begins")
    assert list(facts(run.report)) == ["benchmarks/test_compression.py::test_compression[hf-baseline]"]


def test_without_xdist_a_case_ends_as_a_row_too(runs: dict[str, Run]) -> None:
    rows = {row["case"]["name"]: row for row in read_records(runs["failing"].report)[1]}
    assert runs["failing"].code == pytest.ExitCode.TESTS_FAILED
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(TINY_NAMES, "ok"), "cudaerror": "error", "hungry": "oom",
    }  # fmt: skip


def test_a_case_that_hears_its_alarm_is_stopped(runs: dict[str, Run]) -> None:
    sleeping = runs["sleeping"]
    (row,) = read_records(sleeping.report)[1]
    assert (sleeping.code, row["status"], row["error"]["type"]) == (pytest.ExitCode.TESTS_FAILED, "crashed", "Timeout")
    assert row["reason"] == "timeout: it ran longer than --kv-timeout=4 s and was stopped"
    assert row["error"]["traceback"].splitlines()[-1] == "kvsuite.measure.deadline.CaseTimeout"


# what an import leaves that was cut off: a part that cannot be loaded a second time
HALF_IMPORTED = """

class Importing(Hostile):
    name = "importing"

    def keep(self, view):
        import half

        return super().keep(view)


register_policy(Importing)
"""
HALF = """
import sys, time
from pathlib import Path

if "half_done" in sys.modules:
    raise ImportError("cannot load module more than once per process")
import half_done
if not Path("slept").exists():
    Path("slept").touch()
    time.sleep(600)
"""


def test_an_import_that_was_stopped_ends_the_process(tmp_path: Path) -> None:
    folder = project(tmp_path, CONFTEST + HALF_IMPORTED)
    (folder / "half.py").write_text(HALF)
    (folder / "half_done.py").touch()
    command = (*COMMON, "--kv-method=importing(window=[3,4])", "-k", "importing")
    stopped = run_pytest(folder, *command, "--kv-timeout=6")
    assert stopped.code == pytest.ExitCode.INTERRUPTED
    (row,) = read_records(stopped.report)[1]
    assert (row["status"], row["error"]["type"]) == ("crashed", "Timeout")
    assert len(json.loads((stopped.report / "report.json").read_text())["records"]) == 1
    (line,) = stopped.said("was stopped while it imported or loaded")
    assert "--kv-resume=latest and a longer --kv-timeout, or with -n 1" in line
    assert stopped.said("1 case is left")
    # in a process of their own both are measured
    again = run_pytest(folder, *command, RESUME)
    assert again.code == 0
    assert [row["status"] for row in read_records(again.report)[1]] == ["ok", "ok"]


def test_failed_cases_are_run_again_by_policy(runs: dict[str, Run]) -> None:
    kept, oom = runs["failing again"], runs["failing oom"]
    assert kept.said("error: 2 failed cases of the resumed run were kept")
    assert kept.code == pytest.ExitCode.TESTS_FAILED
    assert oom.said("1 failed ones run again (oom)")
    assert oom.said("1 failed, 7 deselected")
    assert oom.code == pytest.ExitCode.TESTS_FAILED
    lines = [json.loads(line) for line in (oom.report / RECORDS_FILE).read_text().splitlines()]
    assert [line["case"]["name"] for line in lines if line["schema"] == "kvsuite.record/1"].count("hungry") == 2
    report = json.loads((oom.report / "report.json").read_text())
    assert len(report["records"]) == 7


def test_shards_are_a_partition_and_join_to_the_whole(runs: dict[str, Run], tmp_path: Path) -> None:
    parts = [runs["shard 1"], runs["shard 2"]]
    assert [part.code for part in parts] == [0, 0]
    names = [set(facts(part.report)) for part in parts]
    assert names[0].isdisjoint(names[1])
    assert all(names)
    assert main(["merge", *(str(part.report) for part in parts), "-o", str(tmp_path / "whole")]) == 0
    assert facts(tmp_path / "whole") == facts(runs["whole"].report)
    # a part and the whole are not of one sweep
    assert main(["merge", str(parts[0].report), str(runs["whole"].report), "-o", str(tmp_path / "no")]) == 4


def test_an_empty_shard_is_no_failure(runs: dict[str, Run]) -> None:
    run = runs["empty shard"]
    assert run.code == 0
    assert run.said("5 deselected")
    assert not run.reports


def test_a_plan_measures_nothing_and_knows_what_was_measured(runs: dict[str, Run]) -> None:
    planned: Any = runs["planned"]
    whole = runs["whole"]
    assert planned.code == 0
    assert not planned.said(" passed")
    assert len(planned.reports) == 1, "no run was begun"
    for name in TINY_NAMES:
        (line,) = planned.said(f"hf-{name} ")
        assert line.endswith(whole.report.name)
        assert "likely" in line
    assert planned.said("5 cases, ")
    assert planned.said(" on 2 workers")
    assert planned.said("0 will not fit")
