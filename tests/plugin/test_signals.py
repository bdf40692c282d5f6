"""Signals in every phase of a case: the run ends, what was finished is reported, and nothing is left that ignores the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import child_process
from pytest_runs import NO_FIGURES, TINY, Run, clean_environment, copy_benchmarks, run_pytest

from kvsuite.store.records_file import read_records

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
#: where the signal comes, and how many of the three cases are finished then
PHASES = {"import": 1, "load": 1, "quality": 1, "memory": 1, "decode": 1, "hook": 2, "writing": 2, "report": 3}
COMMAND = (
    *TINY, "--kv-max-tokens=12", "--kv-recent-sizes=1,2,3", "--kv-method=recent_only", "-k", "recent_only",
    "-p", "no:benchmark", "-p", "no:cacheprovider",
)  # fmt: skip
# a run that sends itself a signal in the midst of its second case
CONFTEST = """
import os, signal
from pathlib import Path

import pytest
import transformers

from kvsuite.compression import RecentOnly

WHERE, NUMBER = os.environ["STRUCK_IN"], int(os.environ["STRUCK_BY"])
now = {"case": 0, "phase": None}


def strike(where):
    if where == WHERE and (now["case"] == 2 or where == "report"):
        now["case"] = 0
        os.kill(os.getpid(), NUMBER)


@pytest.fixture(autouse=True)
def told(kv_runner):
    now["case"] += 1
    # so that every case loads its model
    kv_runner.sessions.close()
    known = kv_runner.watch

    def watch(record, phase):
        known(record, phase)
        now["phase"] = phase

    kv_runner.watch = watch
    yield
    kv_runner.watch = known


def within_load(*arguments, read=transformers.AutoTokenizer.from_pretrained, **more):
    if now["case"] == 2 and WHERE == "import":
        import struck_while_imported
    strike("load")
    return read(*arguments, **more)


def within_step(self, view, keep=RecentOnly.keep):
    strike(now["phase"])
    return keep(self, view)


def within_write(number, sync=os.fsync):
    if os.readlink(f"/proc/self/fd/{number}").endswith("records.jsonl"):
        strike("writing")
    return sync(number)


transformers.AutoTokenizer.from_pretrained = within_load
RecentOnly.keep = within_step
os.fsync = within_write


def pytest_kvsuite_update_record():
    strike("hook")


def pytest_kvsuite_update_report():
    strike("report")
"""


def struck(folder: Path, where: str, number: int, *arguments: str, conftest: str = "") -> Run:
    copy_benchmarks(folder, conftest=NO_FIGURES + CONFTEST + conftest)
    (folder / "struck_while_imported.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    return run_pytest(folder, *COMMAND, *arguments, STRUCK_IN=where, STRUCK_BY=str(int(number)))


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("where", PHASES)
def test_a_signal_ends_the_run_in_every_phase(
    tmp_path: Path, tiny_model: Path, where: str, number: signal.Signals
) -> None:
    run = struck(tmp_path, where, number, f"--kv-model={tiny_model}")
    assert run.code == pytest.ExitCode.INTERRUPTED, run.out + run.err
    for word in ("INTERNALERROR", "Traceback", " failed", "error: "):
        assert not run.said(word)
    _, rows, notes = read_records(run.report)
    assert not notes
    assert [row["status"] for row in rows] == ["ok"] * PHASES[where]
    report = json.loads((run.report / "report.json").read_text())
    assert {row["id"] for row in report["records"]} == {row["id"] for row in rows}
    left = 3 - len(rows)
    assert bool(run.said(f"{left} cases are left: go on by the same command with --kv-resume=latest")) == bool(left)
