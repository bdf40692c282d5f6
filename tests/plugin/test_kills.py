"""Random SIGKILLs over a sweep, of its process and of workers: no finished row is lost, and the resumed run is the same."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pytest_runs import run_pytest, start_pytest
from sweeps import MANY, facts, project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Facts of the sweep that nobody touched."""
    run = run_pytest(project(tmp_path_factory.mktemp("undisturbed")), *MANY)
    assert run.code == 0, run.out
    return facts(run.report)


def spent(pid: int) -> float:
    """CPU seconds of a process: a moment in its work, however busy the machine is."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return math.inf
    return times.user + times.system


def finished(folder: Path) -> list[dict[str, Any]]:
    """Facts of the runs in ``folder`` that have a report."""
    return [facts(run) for run in (folder / "reports").iterdir() if (run / "report.json").exists()]


def measured(folder: Path) -> int:
    """Rows of cases that are through, of all runs in ``folder``."""
    return sum(file.read_text().count('"status": "ok"') for file in folder.glob("reports/*/records.jsonl"))


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_the_process_is_killed_again_and_again(tmp_path: Path, kills: int, undisturbed: dict[str, Any]) -> None:
    folder, dice = project(tmp_path), random.Random(kills)
    killed, code, said = 0, None, ""
    while killed < kills or code != 0:
        # a sweep that ended before its kills were used up begins anew: a run of its own, beside the finished one
        again = ["--kv-resume=latest"] if code else []
        with start_pytest(folder, *MANY, *again) as under_way:
            patience = dice.uniform(0.0, 1.5) if killed < kills else math.inf
            while not under_way.forked.is_over() and spent(under_way.forked.pid) < patience:
                time.sleep(0.01)
            under_way.forked.send_signal(signal.SIGKILL)
            done = under_way.end()
        code, said = done.code, said + done.out + done.err
        assert code in (0, -signal.SIGKILL), said[-3000:]
        killed += code == -signal.SIGKILL
    found = finished(folder)
    assert found
    assert all(run == undisturbed for run in found)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_workers_are_killed_again_and_again(tmp_path: Path, kills: int, undisturbed: dict[str, Any]) -> None:
    pytest.importorskip("xdist")
    folder, dice = project(tmp_path), random.Random(kills)
    killed, code, said = 0, None, ""
    for _ in range(20 + 2 * kills):
        again = ["--kv-resume=latest"] if code else []
        with start_pytest(folder, *MANY, "-n1", *again) as under_way:
            # behind its first row or a later one: xdist itself gives up where a process dies that still loads what workers
            # need; rows of the worker before it are all written when it starts
            at_start, patience = dict[int, int](), dice.randint(1, 3)
            while killed < kills and not under_way.forked.is_over():
                time.sleep(0.02)
                for worker in under_way.forked.workers():
                    if measured(folder) < at_start.setdefault(worker.pid, measured(folder)) + patience:
                        continue
                    # somewhere in a case
                    time.sleep(dice.uniform(0.0, 0.1))
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
                        killed, patience = killed + 1, dice.randint(1, 3)
            done = under_way.end()
        code, said = done.code, said + done.out + done.err
        if killed >= kills and code == 0:
            break
    assert killed >= kills, said[-3000:]
    assert code == 0, said[-3000:]
    found = finished(folder)
    assert found
    for run in found:
        assert {name: row | {"settings_hash": ""} for name, row in run.items()} == {
            name: row | {"settings_hash": ""} for name, row in undisturbed.items()
        }
        assert {row["settings_hash"] for row in run.values()} == {row["settings_hash"] for row in undisturbed.values()}
