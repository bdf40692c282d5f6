"""Signals in every phase of a case: the run ends, what was finished is reported, and the next signal is not ignored."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path

import pytest
from child_processes import FEWER_PLUGINS, child_process
from pytest_runs import NO_FIGURES, TINY, Run, clean_environment, copy_benchmarks, run_pytest

from kvsuite.plugin.signals import Signals
from kvsuite.store.records_file import read_records

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
#: where the signal comes, and how many of the three cases are finished then
PHASES = {"import": 1, "load": 1, "quality": 1, "memory": 1, "decode": 1, "writing": 2}
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
    if now["case"] == 2:
        # so that it loads its model too
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


def within_step(decide):
    def struck(self, view):
        strike(now["phase"])
        return decide(self, view)

    return struck


def within_write(number, sync=os.fsync):
    if os.readlink(f"/proc/self/fd/{number}").endswith("records.jsonl"):
        strike("writing")
    return sync(number)


transformers.AutoTokenizer.from_pretrained = within_load
# of a prompt, and of every token behind it
RecentOnly.keep, RecentOnly.victim = within_step(RecentOnly.keep), within_step(RecentOnly.victim)
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


@pytest.mark.parametrize(
    ("where", "number", "finished"),
    [
        *((where, signal.SIGTERM, finished) for where, finished in PHASES.items()),
        ("decode", signal.SIGINT, 1),
        ("decode", signal.SIGHUP, 1),
        # which signal it is, and where it comes, have nothing to do with each other
        *(
            pytest.param(where, number, finished, marks=pytest.mark.slow)
            for where, finished in PHASES.items()
            for number in (signal.SIGINT, signal.SIGHUP)
            if where != "decode"
        ),
        ("hook", signal.SIGTERM, 2),
        ("report", signal.SIGTERM, 3),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_ends_the_run_in_every_phase(
    tmp_path: Path, tiny_model: Path, where: str, number: signal.Signals, finished: int
) -> None:
    run = struck(tmp_path, where, number, f"--kv-model={tiny_model}")
    assert run.code == pytest.ExitCode.INTERRUPTED, run.out + run.err
    for word in ("INTERNALERROR", "Traceback", " failed", "error: "):
        assert not run.said(word)
    _, rows, notes = read_records(run.report)
    assert not notes
    assert [row["status"] for row in rows] == ["ok"] * finished
    report = json.loads((run.report / "report.json").read_text())
    assert {row["id"] for row in report["records"]} == {row["id"] for row in rows}
    said = run.said("go on by the same command with --kv-resume=latest")
    left = {1: "2 cases are left", 2: "1 case is left"}
    assert said == ([f"{left[finished]}: go on by the same command with --kv-resume=latest"] if finished < 3 else [])
    # a case whose signal was noted behind it is over, and the others' lines are as they were
    assert run.said(f"{3 if finished == 3 else 1} passed")


def test_before_anything_is_measured_there_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    run = struck(tmp_path, "decode", signal.SIGINT, conftest="now['case'] = 1\n")
    assert run.code == pytest.ExitCode.INTERRUPTED
    assert not run.said("--kv-resume")
    assert not run.reports


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    again = """
import time


def pytest_kvsuite_update_report():
    # what comes in the first second is the same signal, as timeout(1) sends it
    for _ in range(200):
        os.kill(os.getpid(), NUMBER)
        time.sleep(0.1)
    Path("ignored").touch()
"""
    run = struck(tmp_path, "decode", number, conftest=again)
    assert run.code == -number
    assert not (tmp_path / "ignored").exists()
    assert [row["status"] for row in read_records(run.report)[1]] == ["ok"]


def test_what_the_parent_ignores_stays_ignored(tmp_path: Path) -> None:
    # as under nohup
    run = struck(tmp_path, "decode", signal.SIGHUP, conftest="signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    assert run.code == 0
    assert run.said("3 passed")


def test_a_handler_of_the_users_that_exits_ends_the_run(tmp_path: Path) -> None:
    own = "import sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    run = struck(tmp_path, "decode", signal.SIGTERM, conftest=own)
    assert run.code == pytest.ExitCode.INTERRUPTED
    assert [row["status"] for row in read_records(run.report)[1]] == ["ok"]
    assert run.said("2 cases are left")


def test_a_case_that_calls_pytest_exit_ends_the_run(tmp_path: Path) -> None:
    # wrapped on its way, as libraries do
    leaves = """

def strike(where):
    if where == "decode" and now["case"] == 2:
        try:
            pytest.exit("enough", returncode=7)
        except Exception as error:
            raise RuntimeError("a step failed") from error
"""
    run = struck(tmp_path, "decode", signal.SIGTERM, conftest=leaves)
    assert run.code == 7
    assert [row["status"] for row in read_records(run.report)[1]] == ["ok"]
    assert run.said("enough")


def test_a_signal_between_two_lines_ends_no_report() -> None:
    # instructions that belong to no line: a frame that a signal meets there has no line number
    def struck() -> None:
        raise KeyboardInterrupt

    struck.__code__ = struck.__code__.replace(co_linetable=b"")
    with pytest.raises(KeyboardInterrupt) as interrupt:
        struck()
    with pytest.raises(TypeError):
        interrupt.getrepr(funcargs=True)
    Signals().pytest_keyboard_interrupt(interrupt)
    interrupt.getrepr(funcargs=True)
    assert "struck" not in {entry.name for entry in interrupt.traceback}


SLOW_STEPS = """
import time


def strike(where):
    if where == "decode" and now["case"] > 1:
        time.sleep(0.5)
"""


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    # the cases behind the first one last until the signal comes
    copy_benchmarks(tmp_path, conftest=NO_FIGURES + CONFTEST + SLOW_STEPS)
    ours, theirs = os.openpty()
    # the first terminal that a session's leader opens is its own: closing it is what the kernel sends SIGHUP for
    command = f'exec "{sys.executable}" -m pytest "$@" <>{os.ttyname(theirs)} >&0 2>&1'
    environment = clean_environment(STRUCK_IN="nowhere", STRUCK_BY="0", PYTEST_ADDOPTS=FEWER_PLUGINS)
    with child_process(["sh", "-c", command, "sh", *COMMAND], cwd=tmp_path, env=environment) as process:
        said = b""
        # the line of the first case, then pytest's dot: what is being written fails before the signal is heard
        while b"." not in said.partition(b"elapsed")[2]:
            if select.select([ours], [], [], 1)[0]:
                said += os.read(ours, 4096)
            else:
                # a child that was ended by somebody says nothing any more, and its terminal is open here
                assert process.poll() is None, said.decode(errors="replace")
        os.close(theirs)
        os.close(ours)
        process.wait(timeout=300)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    (folder,) = (tmp_path / "reports").iterdir()
    _, rows, _ = read_records(folder)
    assert len(json.loads((folder / "report.json").read_text())["records"]) == len(rows) >= 1
