"""Hooks of a user that go wrong: the rows are kept, and one line says which hook it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest_runs import TINY, copy_benchmarks, run_pytest

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


def test_a_record_that_json_cannot_hold(tmp_path: Path) -> None:
    folder = copy_benchmarks(tmp_path)
    hook = "def pytest_kvsuite_update_record(record):\n    record.effective['mine'] = {1, 2}\n"
    (folder / "conftest.py").write_text(hook)
    run = run_pytest(folder, *FEW)
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert not run.said("INTERNALERROR")
    (line,) = run.said("pytest_kvsuite_update_record: a hook of yours added what JSON cannot hold")
    assert "Object of type set is not JSON serializable" in line
    assert run.reports == []
