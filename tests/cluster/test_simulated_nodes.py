"""Sixty cases on two nodes of Ray that this machine plays; nodes, workers, the processes below them and the controller die."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import scripted_package
from child_processes import child_process, end_group
from pytest_runs import TINY, clean_environment, run_pytest
from sweeps import facts, project

from kvsuite.distribution.cards import workers_of
from kvsuite.distribution.node_plan import START_S, plan_on_nodes, simulated
from kvsuite.distribution.recorded import last_runs, recorded_cases
from kvsuite.options.resolve import default_options

pytest.importorskip("ray", reason='pip install "kvsuite[cluster]"')
pytestmark = pytest.mark.slow

SIZES = tuple(range(6, 36, 2))
ARGUMENTS = (
    *TINY, "--kv-method=streaming_llm,fix_size_l2", f"--kv-recent-sizes={','.join(map(str, SIZES))}",
    f"--kv-fix-kv-sizes={','.join(map(str, SIZES[:10]))}", "--kv-prune-after=4",
    "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:hypothesispytest", "-p", "no:anyio",
)  # fmt: skip
LIMIT_S = 1500


class Nodes:
    """The simulated cluster.

    Parameters
    ----------
    process
        Of ``simulated_nodes.py``.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._heard()

    def tell(self, line: str) -> None:
        """Add or kill a node."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        assert self._heard() == line

    def _heard(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    @property
    def measuring(self) -> list[psutil.Process]:
        """Processes that measure, of this cluster alone."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        return [one for one in below if "kvsuite.cluster.measuring_process" in _command(one)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def simulated_nodes(**env: str) -> Iterator[Nodes]:
    """A cluster without a node yet, whose processes get ``env``."""
    command = [sys.executable, str(Path(__file__).with_name("simulated_nodes.py"))]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "stderr": subprocess.DEVNULL}
    with child_process(command, limit_s=LIMIT_S, env=clean_environment(**env), **streams) as process:
        yield Nodes(process)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with simulated_nodes() as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = run_pytest(project(tmp_path_factory.mktemp("alone")), *ARGUMENTS)
    assert run.code == 0
    return facts(run.report)


def run_until(folder: Path, address: str, *more: str, done: Callable[[], int | None], log: str) -> int:
    """Run on the cluster until it ends, or ``done`` says which signal it gets; its exit code, -9 for one that was killed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--color=no",
        *ARGUMENTS,
        "--kv-cluster=auto",
        "--kv-cluster-cores=1",
        *more,
    ]
    with (folder / log).open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=clean_environment(RAY_ADDRESS=address),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            sent = None
            while process.poll() is None:
                if sent is None and (sent := done()) is not None:
                    process.send_signal(sent)
                time.sleep(0.05)
            return process.wait()
        finally:
            end_group(process)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of the one run, as they are in its file by now."""
    found = list(folder.glob("reports/*/records.jsonl"))
    lines = found[0].read_text().splitlines(keepends=True) if found else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in parsed if line["schema"] == "kvsuite.record/1"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_case_ends_as_one_row_whoever_dies(
    tmp_path: Path, nodes: Nodes, undisturbed: dict[str, Any], seed: int
) -> None:
    dice = random.Random(seed)
    folder = project(tmp_path)
    for _ in range(2):
        nodes.tell("add 2")
    count = len(undisturbed)
    assert count >= 60
    moments = sorted(dice.sample(range(3, 40), 3))
    kills = ["process", "worker", "node"]
    dice.shuffle(kills)

    def disturb() -> int | None:
        there = len(rows(folder))
        if kills and there >= moments[0]:
            if kills[0] == "node":
                nodes.tell("kill 1")
            elif not _kill_one(dice, nodes.measuring, whole_worker=kills[0] == "worker"):
                # none measures at this moment: at the next look
                return None
            moments.pop(0)
            kills.pop(0)
        # the controller goes last, as a power cut would end it
        return signal.SIGKILL if not kills and there >= 48 else None

    assert run_until(folder, nodes.address, done=disturb, log="first.txt") == -signal.SIGKILL
    first = rows(folder)
    assert max(Counter(row["id"] for row in first).values()) == 1
    crashed = [row for row in first if row["status"] == "crashed"]
    assert len(crashed) <= 2, "one each of a killed process and worker, none for one that was between two cases"
    assert {row["error"]["type"] for row in crashed} <= {"SIGKILL", "worker lost"}
    given_back = [row for row in first if any("given back once" in warning for warning in row["warnings"])]
    assert len(given_back) <= 2, "what the node's two workers were measuring"
    _wait_until_none_is_left(nodes)

    # another number of nodes, and an end by a scheduler's signal
    nodes.tell("add 1")
    code = run_until(
        folder, nodes.address, "--kv-resume=latest", log="second.txt",
        done=lambda: signal.SIGTERM if len(rows(folder)) >= 52 else None,
    )  # fmt: skip
    assert code == pytest.ExitCode.INTERRUPTED, (folder / "second.txt").read_text()[-3000:]
    assert "go on by the same command with --kv-resume=latest" in (folder / "second.txt").read_text()
    _wait_until_none_is_left(nodes)

    code = run_until(folder, nodes.address, "--kv-resume=latest", log="third.txt", done=lambda: None)
    assert code == 0, (folder / "third.txt").read_text()[-3000:]
    (report,) = (folder / "reports").iterdir()
    found = facts(report)
    assert {name: row["case_key"] for name, row in found.items()} == {
        name: row["case_key"] for name, row in undisturbed.items()
    }
    assert _results(found) == _results(undisturbed)
    last = {row["id"]: row for row in rows(folder)}
    assert all(row["effective"]["node"]["ip"] for row in last.values())
    _wait_until_none_is_left(nodes)


def _kill_one(dice: random.Random, victims: list[psutil.Process], *, whole_worker: bool) -> bool:
    """Kill a process that measures, or the worker above it; whether there was one."""
    if not victims:
        return False
    try:
        victim = dice.choice(victims)
        target = victim.parent() if whole_worker else victim
        if target is None:
            return False
        target.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _results(found: dict[str, Any]) -> dict[str, Any]:
    return {name: (row["status"], row["metrics"]) for name, row in found.items()}


def _wait_until_none_is_left(nodes: Nodes) -> None:
    ends = time.monotonic() + 60
    while nodes.measuring and time.monotonic() < ends:
        time.sleep(0.2)
    assert not nodes.measuring


def test_a_sweep_takes_on_two_nodes_what_the_plan_has_from_records_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of a model whose loading, which this engine leaves out, is no time
    cases = [{"name": f"c{at}", "model": "tiny", "bytes": at, "does": str(0.5 + 7 * at % 20 / 10)} for at in range(20)]
    monkeypatch.syspath_prepend(scripted_package.install(tmp_path, cases))
    (tmp_path / "test_scripted.py").write_text(scripted_package.BENCHMARK)
    path = {"PYTHONPATH": str(tmp_path)}
    command = ("test_scripted.py", "--kv-device=cpu", "-p", "no:cacheprovider", "-p", "no:benchmark")
    assert run_pytest(tmp_path, *command, "--kv-report-dir=alone", **path).code == 0

    asked = default_options(report_dir=str(tmp_path / "alone"), plan="true", nodes="2xcpu", device="cpu")
    workers = workers_of("2xcpu", "cpu")
    recorded = recorded_cases(last_runs(tmp_path / "alone"), asked)
    planned, records = plan_on_nodes([one.case for one in recorded], asked, workers, recorded)
    assert {time.mark for each in planned for time in each.times} == {""}
    plan = simulated(planned, records, workers, None, 0)

    with simulated_nodes(**path) as there:
        for _ in range(2):
            there.tell("add 1")
        run = run_pytest(tmp_path, *command, "--kv-cluster=auto", RAY_ADDRESS=there.address, **path)
    assert run.code == 0, run.out
    clocks: dict[str, list[list[float]]] = {}
    for row in run.rows().values():
        clocks.setdefault(row["effective"]["node"]["id"], []).append(row["samples"]["clock"])
    assert len(clocks) == len(plan.ran) == 2
    begun = [min(own)[0] for own in clocks.values()]
    span = max(end for own in clocks.values() for _, end in own) - min(begun)
    # the plan's workers begin together, and those of two nodes do not
    apart = max(begun) - min(begun)
    print(f"planned {plan.seconds - START_S:.2f} s, took {span:.2f} s, of them {apart:.2f} s with one worker")
    # each node had about what the plan gives a worker: times are for the reader alone, of a machine that may be busy
    assert sorted(map(len, clocks.values())) == pytest.approx(sorted(map(len, plan.ran)), abs=3)
    assert sum(map(len, clocks.values())) == len(cases)
