"""What the watchdog finds in the black box of a run without workers, before a case is measured and after its row is written."""

from __future__ import annotations

from pathlib import Path

# a run inside this process forgets what it imported, and numpy cannot be loaded twice
import pyarrow.parquet
import pytest
import rich.table
import scipy.stats
from scripted_runs import ARGUMENTS, project

from kvsuite.case import digest
from kvsuite.store.records_file import read_records
from kvsuite.store.validate import validate
from kvsuite.survival.black_box import read_box
from kvsuite.survival.watchdog import _close

LOADED = (pyarrow, rich, scipy)
# copies the box where a fixture of a user could hang
CONFTEST = """
import shutil
from kvsuite.plugin.stash import BOX


@pytest.fixture(autouse=True)
def slow(pytestconfig, request):
    box, name = pytestconfig.stash[BOX]._path, request.node.callspec.id
    shutil.copy(box, f"{name}-setup.json")
    yield
    shutil.copy(box, f"{name}-teardown.json")
"""


@pytest.fixture
def folder(pytester: pytest.Pytester) -> Path:
    """A finished run and the boxes of its cases."""
    project(pytester.path)
    with (pytester.path / "conftest.py").open("a") as file:
        file.write(CONFTEST)
    result = pytester.runpytest_inprocess(
        *ARGUMENTS, "--kv-timeout=600", "--kv-method=recent_only", "-p", "no:warnings"
    )
    assert result.ret == 0
    return pytester.path


def end(box: Path) -> None:
    entry = read_box(box)
    assert entry is not None
    _close(entry, entry, 600.0)


def test_a_case_that_hangs_in_setup_or_teardown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = (folder / "reports").iterdir()
    run, rows, _ = read_records(report)
    first, second = (row["case"]["name"] for row in rows)

    end(folder / f"hf-{first}-teardown.json")
    assert read_records(report) == (run, rows, []), "a case that is measured keeps its row"
    assert "its teardown ran longer than --kv-timeout=600 s" in capsys.readouterr().err

    end(folder / f"hf-{second}-setup.json")
    _, after, _ = read_records(report)
    assert [(row["case"]["name"], row["status"]) for row in after] == [(first, "ok"), (second, "crashed")]
    assert (after[1]["error"]["phase"], after[1]["env"]) == ("setup", run["env"])

    # nothing was written yet, nor looked at
    end(folder / f"hf-{first}-setup.json")
    (other,) = set((folder / "reports").iterdir()) - {report}
    run, (row,), _ = read_records(other)
    validate("record", row, "row")
    assert (row["status"], row["env"]) == ("crashed", digest(run["environment"]))
    assert "gpu" not in run["environment"]
