"""Random SIGKILLs over a sweep, of its process and of workers: no finished row is lost, and the resumed run is the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import child_process
from pytest_runs import clean_environment, run_pytest
from sweeps import MANY, facts, project

from kvsuite.store.records_file import read_records

LOOP = Path(__file__).with_name("kill_loop.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Facts of the sweep that nobody touched."""
    run = run_pytest(project(tmp_path_factory.mktemp("undisturbed")), *MANY)
    assert run.code == 0, run.out
    return facts(run.report)


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_the_process_is_killed_again_and_again(tmp_path: Path, kills: int, undisturbed: dict[str, Any]) -> None:
    folder = project(tmp_path)
    told = {"arguments": MANY, "kills": kills, "seed": kills, "longest_s": 3.0}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(LOOP)], cwd=folder, input=json.dumps(told), env=clean_environment(),
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["code"], result["killed"]) == (0, kills), (folder / "out.txt").read_text()[-3000:]
    finished = [run for run in (folder / "reports").iterdir() if (run / "report.json").exists()]
    assert finished
    for run in finished:
        assert facts(run) == undisturbed


def kill_a_worker(controller: subprocess.Popen[bytes]) -> bool:
    """Kill one that is up: xdist itself gives up where a process dies while it still loads the machinery of workers."""
    try:
        for worker in psutil.Process(controller.pid).children():
            if worker.cpu_times().user > 0.5:
                worker.kill()
                return True
    except psutil.NoSuchProcess:
        pass
    return False


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_workers_are_killed_again_and_again(tmp_path: Path, kills: int, undisturbed: dict[str, Any]) -> None:
    pytest.importorskip("xdist")
    folder, dice = project(tmp_path), random.Random(kills)
    killed, again = 0, False
    for _ in range(20 + 2 * kills):
        extra = ["--kv-resume=latest"] if again else []
        with (
            (folder / "out.txt").open("a") as out,
            child_process(
                [sys.executable, "-m", "pytest", *MANY, "-n1", *extra], limit_s=600, cwd=folder, env=clean_environment(),
                stdout=out, stderr=out,
            ) as process,
        ):  # fmt: skip
            # while it collects, in its first case or in a later one
            while killed < kills and process.poll() is None:
                time.sleep(dice.uniform(0.0, 6.0))
                killed += kill_a_worker(process)
            process.wait()
        runs = list((folder / "reports").iterdir()) if (folder / "reports").exists() else []
        # ended before its first row: there is nothing to go on with
        again = bool(runs)
        if not again:
            continue
        (run,) = runs
        _, rows, _ = read_records(run)
        if killed == kills and all(row["status"] == "ok" for row in rows) and len(rows) == len(undisturbed):
            break
    said = (folder / "out.txt").read_text()
    assert killed == kills, said[-3000:]
    assert process.returncode == 0, said[-3000:]
    found = facts(run)
    assert {name: row | {"settings_hash": ""} for name, row in found.items()} == {
        name: row | {"settings_hash": ""} for name, row in undisturbed.items()
    }
    assert {row["settings_hash"] for row in found.values()} == {row["settings_hash"] for row in undisturbed.values()}
