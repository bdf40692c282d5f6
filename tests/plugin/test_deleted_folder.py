"""The folder of a run is deleted or moved while the run goes on: one line, a failing exit, and the rows on the terminal."""

from __future__ import annotations

# a run inside this process forgets what it imported, and numpy cannot be loaded twice
import pyarrow.parquet
import pytest
import rich.table
import scipy.stats
from scripted_runs import ARGUMENTS, project

LOADED = (pyarrow, rich, scipy)


@pytest.mark.parametrize(
    ("hook", "code"),
    [
        # behind each test, so that the next row finds no folder
        ("pytest_runtest_logfinish(nodeid, location)", pytest.ExitCode.USAGE_ERROR),
        ("pytest_sessionfinish(session)", pytest.ExitCode.TESTS_FAILED),
    ],
    ids=["between two cases", "behind the last"],
)
def test_it_is_told_and_the_run_fails(pytester: pytest.Pytester, hook: str, code: pytest.ExitCode) -> None:
    folder = project(pytester.path)
    with (folder / "conftest.py").open("a") as file:
        file.write(f"\n\n@pytest.hookimpl(tryfirst=True)\ndef {hook}:\n    __import__('shutil').rmtree('reports')\n")
    result = pytester.runpytest_inprocess(*ARGUMENTS)
    said = result.stdout.str() + result.stderr.str()
    assert result.ret == code
    assert "records.jsonl was deleted or moved while the run wrote it, and its rows with it" in said
    assert "INTERNALERROR" not in said
    assert "records and figures" not in said
    # what was measured is shown all the same
    assert "TTFT(s)" in said
    assert not (folder / "reports").exists()
