"""A run that another process writes is not taken up, and that is found out before anything is measured."""

from __future__ import annotations

# a run inside this process forgets what it imported, and numpy cannot be loaded twice
import pyarrow.parquet
import pytest
import rich.table
import scipy.stats
from scripted_runs import ARGUMENTS, project, script

from kvsuite.store.records_file import RECORDS_FILE
from kvsuite.store.store import RecordStore

LOADED = (pyarrow, rich, scipy)
# a run is taken up only on the machine that it was measured on
CONFTEST = """
from kvsuite.meters.environment import host_facts


@pytest.fixture(scope="session", autouse=True)
def here(kv_runner):
    kv_runner.environment = host_facts() | {"gpu": {}}


def pytest_kvsuite_update_record(config, record, session):
    with open("measured.txt", "a") as file:
        file.write(record.case.name + "\\n")
"""


def test_a_run_that_still_goes_on_is_found_out_before_anything_is_measured(pytester: pytest.Pytester) -> None:
    folder = project(pytester.path)
    with (folder / "conftest.py").open("a") as file:
        file.write(CONFTEST)
    script(folder, streaming_6={"status": "error"})
    assert pytester.runpytest_inprocess(*ARGUMENTS).ret == pytest.ExitCode.TESTS_FAILED
    (run,) = (folder / "reports").iterdir()
    (folder / "measured.txt").unlink()
    files = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with RecordStore.reopen(run):
        refused = pytester.runpytest_inprocess(*ARGUMENTS, "--kv-resume=latest")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert f"{RECORDS_FILE}: another process is writing it; wait for that run" in refused.stderr.str()
    assert not (folder / "measured.txt").exists()
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == files
    # which is over now
    script(folder)
    assert pytester.runpytest_inprocess(*ARGUMENTS, "--kv-resume=latest").ret == 0
    assert (folder / "measured.txt").read_text() == "streaming_6\n"
