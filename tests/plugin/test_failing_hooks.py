"""Hooks of a user that go wrong: the rows are kept, and one line says which hook it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, copy_benchmarks, run_pytest

from kvsuite.store.validate import validate

FEW = (*TINY, "-k", "baseline or streaming_6", "-p", "no:benchmark")


def test_a_figure_that_cannot_be_drawn(tmp_path: Path) -> None:
    folder = copy_benchmarks(tmp_path)
    (folder / "conftest.py").write_text("def pytest_kvsuite_figures(rows):\n    return [rows[99]]\n")
    run = run_pytest(folder, *FEW)
    assert run.code == pytest.ExitCode.TESTS_FAILED
    assert run.said("2 passed")
    assert not run.said("INTERNALERROR")
    (line,) = run.said("error: ")
    assert "IndexError: list index out of range" in line
    assert "records.jsonl, redraw with python -m kvsuite report" in line
    assert len(json.loads((run.report / "report.json").read_text())["records"]) == 2


# a plugin that behaves, beside one that does not: what it adds stays
BESIDE = """
class Beside:
    def pytest_kvsuite_update_record(self, record):
        record.effective["rack"] = "b12"


def pytest_sessionstart(session):
    session.config.pluginmanager.register(Beside(), "beside")


def pytest_kvsuite_update_record(config, record):
    record.effective["half"] = "way"
    if record.case.policy:
        {spoils}
"""


@pytest.mark.parametrize(
    ("spoils", "said"),
    [
        ("raise RuntimeError('no fan is turning')", "RuntimeError: no fan is turning"),
        ("record.metrics['ttft_s']['value'] = float('nan')", "ValueError: Out of range float values"),
        ("record.effective['mine'] = {1, 2}", "TypeError: Object of type set is not JSON serializable"),
        ("record.status = 'fine'", "not a valid record, at status"),
    ],
    ids=["raises", "NaN", "set", "schema"],
)
def test_a_record_that_a_hook_spoils_is_kept_as_it_was_measured(tmp_path: Path, spoils: str, said: str) -> None:
    folder = copy_benchmarks(tmp_path, conftest=NO_FIGURES + BESIDE.format(spoils=spoils))
    run = run_pytest(folder, *FEW)
    assert run.code == pytest.ExitCode.TESTS_FAILED
    assert run.said("1 failed, 1 passed")
    assert not run.said("INTERNALERROR")
    rows = run.rows()
    assert {name: row["status"] for name, row in rows.items()} == {"baseline": "ok", "streaming_6": "ok"}
    spoiled, fine = rows["streaming_6"], rows["baseline"]
    assert (fine["effective"]["half"], fine["effective"]["rack"]) == ("way", "b12")
    assert "half" not in spoiled["effective"]
    assert spoiled["effective"]["rack"] == "b12"
    assert spoiled["metrics"]["ttft_s"]["value"] > 0
    (warning,) = (one for one in spoiled["warnings"] if "pytest_kvsuite_update_record" in one)
    assert f"{folder / 'conftest.py'} failed" in warning
    assert said in warning
    assert run.said(warning[:60])
    validate("record", spoiled, "row")


def test_a_hook_that_ends_the_run_loses_no_row(tmp_path: Path) -> None:
    ends = "import pytest\ndef pytest_kvsuite_update_record():\n    pytest.exit('enough', returncode=9)\n"
    folder = copy_benchmarks(tmp_path, conftest=NO_FIGURES + ends)
    run = run_pytest(folder, *FEW)
    assert run.code == 9
    assert len(run.rows()) == 1


@pytest.mark.parametrize("spoils", ["rows[0].clear() or rows[99]", "rows[0].update(warnings=float('nan'))"])
def test_a_report_that_a_hook_spoils_is_that_of_the_records(tmp_path: Path, spoils: str) -> None:
    hook = f"def pytest_kvsuite_update_report(rows):\n    {spoils}\n"
    folder = copy_benchmarks(tmp_path, conftest=NO_FIGURES + hook)
    run = run_pytest(folder, *FEW)
    assert run.code == pytest.ExitCode.TESTS_FAILED
    (line,) = run.said("error: ")
    assert "pytest_kvsuite_update_report" in line
    # a report has the order of the space, the file that of the run
    rows = sorted(run.rows().values(), key=lambda row: row["case_index"])
    assert json.loads((run.report / "report.json").read_text())["records"] == rows
