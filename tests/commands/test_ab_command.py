"""``python -m kvsuite ab``: real repositories, real processes, a real sleep in the loop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_processes import FEWER_PLUGINS, child_process

from kvsuite.comparison.interleaved import order

ROOT = Path(__file__).parents[2]
# where an engine's decode step begins
LOOP = '        """One decode step: the following token ``[1, 1]``; waits for nothing."""'
# a runner whose only work is a loop of two steps; slow.py is what revisions change
CONFTEST = """
import time

import pytest

from kvsuite.metrics import MetricRegistry
from kvsuite.measure.runner import Measured
from kvsuite.record import Record
from kvsuite.options.common import CommonOptions
from kvsuite.plugin.stash import RUNNER
from slow import step


def pytest_configure(config):
    config.hook.pytest_kvsuite_figures._remove_plugin(config.pluginmanager.get_plugin("kvsuite"))


class Loop:
    environment = {"host": {}, "gpu": {}, "packages": {}, "command": ["pytest"]}

    class sessions:
        current = None

    def __init__(self, rounds):
        self.rounds = rounds

    def run(self, case, case_id, *, order_index, run_rounds, progress):
        record = Record(case=case, id=case_id, case_key="k", rounds=self.rounds, model={"label": "loop"})
        speeds = []
        for _ in range(self.rounds):
            begin = time.perf_counter()
            for _ in range(2):
                step()
            speeds.append(2 / (time.perf_counter() - begin))
        record.metrics["decode_tok_s_agg"] = MetricRegistry().value("decode_tok_s_agg", speeds)
        return Measured(record)


@pytest.fixture(scope="session")
def kv_runner(pytestconfig, kv_options):
    runner = pytestconfig.stash[RUNNER] = Loop(kv_options.of(CommonOptions).rounds)
    return runner
"""
STEP = "import time\n\n\ndef step():\n    time.sleep({})\n"
MORE = "    time.sleep({})\n"
TEST = """
import pytest


@pytest.mark.kv_suite("compression")
def test_loop(kv_case, kv_run):
    kv_run(kv_case)
"""
ARGUMENTS = ["-k", "baseline", "--kv-model=dummy:tiny", "--kv-device=cpu"]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("KV_", "PYTEST_", "GIT_"))}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTEST_ADDOPTS": FEWER_PLUGINS,
    }


def ab(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvsuite", "ab", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A user's repository: ``fast`` is a tag, the working tree is the same, uncommitted changes included."""
    folder = tmp_path / "repository"
    (folder / "bench").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "slow.py").write_text(STEP.format(0.03))
    (folder / "bench" / "test_loop.py").write_text(TEST)
    (folder / "pytest.ini").write_text("[pytest]\nkv_compare = latest\nkv_fail = default\n")
    (folder / ".gitignore").write_text("reports/\n__pycache__/\n.benchmarks/\n")
    commit(folder, "fast")
    git(folder, "tag", "fast")
    return folder


@pytest.mark.slow
def test_8_percent_less_speed_is_named(repository: Path) -> None:
    (repository / "slow.py").write_text(STEP.format(0.5))
    commit(repository, "long steps")
    (repository / "slow.py").write_text(STEP.format(0.5) + MORE.format(0.5 / 0.92 - 0.5))
    done = ab(
        repository, "HEAD", ".", "--processes", "3", "--out", "out", "--fail", "decode_tok_s:-5%", "--", *ARGUMENTS
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "regression " in line]
    assert line.split()[:2] == ["hf-baseline", "decode_tok_s_agg"]
    same = ab(repository, "HEAD", "HEAD", "--processes", "2", "--out", "same", "--", *ARGUMENTS)
    assert same.returncode == 0, same.stdout + same.stderr


def test_a_slower_loop_in_a_dirty_tree_is_named(repository: Path) -> None:
    (repository / "slow.py").write_text(STEP.format(0.03) + MORE.format(0.03))
    (repository / "new.txt").write_text("not committed")
    done = ab(
        repository, "fast", ".", "--processes", "3", "--out", "out", "--fail", "decode_tok_s:-5%", "--", *ARGUMENTS
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "regression " in line]
    assert line.split()[:2] == ["hf-baseline", "decode_tok_s_agg"]
    assert "tok/s" in line
    assert "[6/6] head-3: . (working tree)" in done.stdout
    assert " left" in done.stdout
    found = json.loads((repository / "out" / "comparison.json").read_text())
    assert found["base"]["label"].startswith("fast (")
    assert found["now"]["label"] == ". (working tree)"
    assert [len(list((repository / "out" / side).iterdir())) for side in ("base", "head")] == [3, 3]
    # what is left is what was there, and the records
    assert git(repository, "worktree", "list").count("\n") == 0
    assert git(repository, "status", "--porcelain").split() == ["M", "slow.py", "??", "new.txt", "??", "out/"]
    # the folders give the same verdict again
    again = subprocess.run(
        [sys.executable, "-m", "kvsuite", "compare", "out/base", "out/head", "--fail", "decode_tok_s:-5%"],
        cwd=repository, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert again.returncode == 1
    assert line in again.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_removes_the_work_trees(repository: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "kvsuite", "ab", "fast", "fast", "--out", "out", "--", *ARGUMENTS]
    with child_process(
        command,
        limit_s=240,
        cwd=repository,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (repository / "out" / "base-1.log").exists() and process.poll() is None:
            time.sleep(0.1)
        assert git(repository, "worktree", "list").count("\n") == 2
        os.killpg(process.pid, number)
        _, err = process.communicate()
    assert process.returncode == 130
    assert "the work trees are removed" in err
    assert git(repository, "worktree", "list").count("\n") == 0


BAD = {
    "revision": (["nope", "."], "BASE=nope: give a branch, a tag, a commit, or . for the working tree"),
    "processes": (["fast", ".", "--processes", "1"], "--processes=1: one process a side cannot tell code from luck"),
    "rules": (["fast", ".", "--fail", "tpott:+5%"], "--fail=tpott:+5%: no metric tpott (did you mean tpot?)"),
    "folder": (["fast", ".", "--out", "bench"], "--out=bench: cannot be made (File exists); give a new folder"),
    "pytest": (["fast", ".", "--", "--no-such-option"], "pytest measured nothing (exit code 4)"),
    "rounds": (["fast", ".", "--", *ARGUMENTS, "--kv-rounds=2"], "timed in 2 rounds, 7 are needed; drop --kv-rounds"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_exit_code_2(repository: Path, arguments: list[str], message: str) -> None:
    done = ab(repository, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert git(repository, "worktree", "list").count("\n") == 0


def test_outside_a_repository(tmp_path: Path) -> None:
    done = ab(tmp_path, "a", "b")
    assert done.returncode == 2
    assert "run ab inside a git repository" in done.stderr


def test_order() -> None:
    assert [order(processes) for processes in (2, 3, 4)] == ["ABBA", "ABBAAB", "ABBAABBA"]


@pytest.mark.slow
def test_this_repository_with_a_slower_decode_loop(tmp_path: Path) -> None:
    """The engine's own loop: its steps take 50 ms by a sleep in both revisions, and one revision sleeps 8 % longer."""
    folder = tmp_path / "copy"
    for name in ("kvsuite", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pytest.ini", folder)
    (folder / ".gitignore").write_text("reports/\n__pycache__/\n.benchmarks/\n")
    flow = folder / "kvsuite" / "engines" / "flow.py"
    plain = flow.read_text()
    git(folder, "init", "-q")
    for tag, seconds in (("base", 0.05), ("head", 0.05 / 0.92)):
        source = plain.replace(LOOP, f"{LOOP}\n        __import__('time').sleep({seconds})")
        assert source != plain
        flow.write_text(source)
        commit(folder, tag)
        git(folder, "tag", tag)
    arguments = [
        "benchmarks", "-k", "compression and baseline", "--kv-model=dummy:tiny", "--kv-device=cpu", "--kv-threads=1",
        "--kv-prompt-tokens=16", "--kv-max-new-tokens=8",
    ]  # fmt: skip
    rules = ["--processes", "3", "--fail", "decode_tok_s:-5%"]
    slower = ab(folder, "base", "head", *rules, "--out", "slower", "--", *arguments)
    assert slower.returncode == 1, slower.stdout + slower.stderr
    (line,) = [line for line in slower.stdout.splitlines() if "regression " in line]
    assert line.split()[:2] == ["hf-baseline", "decode_tok_s_agg"]
    same = ab(folder, "base", "base", *rules, "--out", "same", "--", *arguments)
    assert same.returncode == 0, same.stdout + same.stderr
