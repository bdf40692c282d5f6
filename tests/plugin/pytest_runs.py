"""Runs of pytest as a user starts them: a folder, a command line, then exit code, output and files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
TINY_NAMES = ["baseline", "recent_only_6", "recent_only_10", "streaming_6", "streaming_10"]
_OURS = ("KV_", "PYTEST_", "KVSUITE_")


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


def run_pytest(folder: Path, *arguments: str, **env: str) -> Run:
    """Run pytest in ``folder`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--color=no", *arguments],
        cwd=folder, env=clean_environment(**env), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return Run(done.returncode, done.stdout, done.stderr, folder)


def copy_benchmarks(folder: Path, *suites: str) -> Path:
    """What a user of the repository has: ``pytest.ini`` and of ``benchmarks/`` these suites, else the compression suite.

    The other suites have no cases of the tiny dummy model that most tests run.
    """
    (folder / "benchmarks").mkdir(parents=True)
    for suite in suites or ("compression",):
        shutil.copy(ROOT / "benchmarks" / f"test_{suite}.py", folder / "benchmarks")
    shutil.copy(ROOT / "benchmarks" / "conftest.py", folder / "benchmarks")
    shutil.copy(ROOT / "pytest.ini", folder)
    return folder


def rotated(names: list[Any], seed: int) -> list[Any]:
    """The order in which cases run."""
    shift = seed % len(names)
    return names[shift:] + names[:shift]
