"""A comparison of cases that tests make by hand: no space knows them, and under xdist no controller does."""

from __future__ import annotations

import json
from pathlib import Path

# a run inside this process forgets what it imported, and numpy cannot be loaded twice
import pyarrow.parquet
import pytest
import rich.table
import scipy.stats
from pytest_runs import run_pytest
from scripted_runs import ARGUMENTS, project, script

LOADED = (pyarrow, rich, scipy)
BY_HAND = """
from kvsuite.case import Case

def test_tight(kv_run):
    kv_run(Case("mine", "hf", "dummy:tiny", "tight", "cpu", "float32"))
"""


def test_a_file_of_cases_made_by_hand_that_was_left_out_is_not_missing(pytester: pytest.Pytester) -> None:
    project(pytester.path)
    for name in ("tight", "wide"):
        (pytester.path / f"test_{name}.py").write_text(BY_HAND.replace("tight", name))
    result = pytester.runpytest_inprocess(*ARGUMENTS, "test_tight.py", "test_wide.py")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["mine *PPL*", "tight *150.00*", "wide *150.00*"])
    pytester.runpytest_inprocess(
        *ARGUMENTS, "test_tight.py", "--kv-compare=latest", "--kv-fail=missing"
    ).assert_outcomes(passed=1)
    (comparison,) = pytester.path.glob("reports/*/comparison.json")
    assert json.loads(comparison.read_text())["missing"] == []


def test_under_xdist_cases_made_by_hand_are_gated_too(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    folder = project(tmp_path / "forked")
    (folder / "benchmarks" / "test_compression.py").unlink()
    (folder / "benchmarks" / "test_mine.py").write_text(BY_HAND)
    gated = (*ARGUMENTS, "-n1", "--kv-compare=latest", "--kv-fail=default")
    run = run_pytest(folder, *gated)
    assert run.code == 1
    assert run.said("--kv-compare=latest: no run under reports that has a case of this one")
    # it measured, and is the base now
    script(folder, tight={"metrics": {"kv_bytes_exact": 2_000_000}})
    run = run_pytest(folder, *gated)
    assert run.code == 1
    assert run.said("kv_bytes_exact 1 MiB -> 1.907 MiB (+90.7 %); regression; rule kv_bytes_exact:+0")
