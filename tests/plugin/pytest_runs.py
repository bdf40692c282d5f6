"""Runs of pytest as a user starts them: a folder, a command line, then exit code, output and files."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked_runs import ForkedRun, run_forked

ROOT = Path(__file__).parents[2]
# a case takes milliseconds, so that a run costs what loading torch costs
TINY = (
    "--kv-model=dummy:tiny",
    "--kv-device=cpu",
    "--kv-threads=1",
    "--kv-prompt-tokens=16",
    "--kv-max-new-tokens=4",
    "--kv-start-size=2",
    "--kv-recent-sizes=4,8",
    "--kv-rounds=2",
    "--kv-num-warmup=1",
)
# a conftest.py: drawing would be half of the time of such a run
NO_FIGURES = """
def pytest_configure(config):
    get = config.pluginmanager.get_plugin
    config.hook.pytest_kvsuite_figures._remove_plugin(get("kvsuite") or get("kvsuite.plugin"))
"""
TINY_NAMES = ["baseline", "recent_only_6", "recent_only_10", "streaming_6", "streaming_10"]
_OURS = ("KV_", "PYTEST_", "KVSUITE_")
#: a plugin is loaded before the run where something else needs its modules
_LOADED_BEFORE = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")


@dataclass
class Run:
    """One finished pytest."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def reports(self) -> list[Path]:
        """Everything under the report folder."""
        base = self.folder / "reports"
        return sorted(base.iterdir()) if base.exists() else []

    @property
    def report(self) -> Path:
        """The one run folder."""
        (only,) = self.reports
        return only

    def lines(self) -> list[dict[str, Any]]:
        """The run line and the record rows, as they are in the file."""
        return [json.loads(line) for line in (self.report / "records.jsonl").read_text().splitlines()]

    def rows(self) -> dict[str, dict[str, Any]]:
        """Record rows by the name of their case, in the order they were written."""
        rows = [line for line in self.lines() if line["schema"] == "kvsuite.record/1"]
        found = {row["case"]["name"]: row for row in rows}
        assert len(found) == len(rows), "a case has two rows"
        return found

    def said(self, text: str) -> list[str]:
        """Lines of the output that hold ``text``."""
        return [line for line in (self.out + self.err).splitlines() if text in line]


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without anything that decides for pytest or kvsuite, and without a hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


@dataclass
class UnderWay:
    """A run that has been started."""

    forked: ForkedRun
    _out: Path
    _err: Path
    _folder: Path

    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text()

    def end(self) -> Run:
        """Wait for its end."""
        code = self.forked.wait()
        return Run(code, self.out(), self._err.read_text(), self._folder)


@contextlib.contextmanager
def start_pytest(folder: Path, *arguments: str, **env: str) -> Iterator[UnderWay]:
    """Start pytest in ``folder`` in a process of its own, which is killed when the block is left.

    The process is a fork of one that has loaded torch.
    """
    # plugins that load much and have nothing to do here
    command = ["-p", "no:hypothesispytest", "-p", "no:anyio", "--color=no", *arguments]
    with _start(folder, ["pytest", "-p", "quick_machine", *command, *_LOADED_BEFORE], clean_environment(**env)) as run:
        yield run


def run_pytest(folder: Path, *arguments: str, **env: str) -> Run:
    """Run pytest as `start_pytest` does, to its end."""
    with start_pytest(folder, *arguments, **env) as run:
        return run.end()


def run_module(folder: Path, module: str, *arguments: str, **env: str) -> Run:
    """Run ``python -m module`` in ``folder``, in such a process too."""
    options = shlex.join(["-p", "no:hypothesispytest", "-p", "no:anyio", *_LOADED_BEFORE])
    with _start(folder, [module, *arguments], clean_environment(**{"PYTEST_ADDOPTS": options} | env)) as run:
        return run.end()


@contextlib.contextmanager
def _start(folder: Path, command: list[str], environment: dict[str, str]) -> Iterator[UnderWay]:
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        out.touch()
        err.touch()
        with run_forked(folder, command, environment, out, err) as forked:
            yield UnderWay(forked, out, err, folder)


def copy_benchmarks(folder: Path, *suites: str, conftest: str | None = None) -> Path:
    """What a user of the repository has: ``pytest.ini`` and of ``benchmarks/`` these suites, else the compression suite.

    The other suites have no cases of the tiny dummy model that most tests run. ``conftest`` is the text of a ``conftest.py``.
    """
    (folder / "benchmarks").mkdir(parents=True)
    for suite in suites or ("compression",):
        shutil.copy(ROOT / "benchmarks" / f"test_{suite}.py", folder / "benchmarks")
    shutil.copy(ROOT / "benchmarks" / "conftest.py", folder / "benchmarks")
    shutil.copy(ROOT / "pytest.ini", folder)
    if conftest is not None:
        (folder / "conftest.py").write_text(conftest)
    return folder


def rotated(names: list[Any], seed: int) -> list[Any]:
    """The order in which cases run."""
    shift = seed % len(names)
    return names[shift:] + names[:shift]
