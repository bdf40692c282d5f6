"""Processes of two revisions in turns on one machine: ABBA, so that drift falls on both sides alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvsuite.errors import UserError

from .revisions import Revision, git_free_environment
from .sides import Side, read_side

MIN_PROCESSES = 2
MIN_ROUNDS = 7
_TAIL = 15


def order(processes: int) -> str:
    """Sides in turn, ``processes`` of each: ``ABBA``, ``ABBAAB``, ``ABBAABBA`` ..."""
    return ("ABBA" * processes)[: 2 * processes]


def run_process(revision: Revision, inside: Path, arguments: Sequence[str], reports: Path, log: Path) -> None:
    """Run one pytest of a revision, with its code first on the path of the same interpreter.

    Parameters
    ----------
    revision
        What is checked out where.
    inside
        Folder to run in, relative to the repository.
    arguments
        pytest's.
    reports
        Report folder of this side.
    log
        File that takes the output.

    Raises
    ------
    UserError
        If it measured nothing, with the end of its output.
    """
    known = set(reports.iterdir()) if reports.is_dir() else set()
    command = [
        sys.executable, "-m", "pytest", f"--kv-rounds={MIN_ROUNDS}", *arguments, f"--kv-report-dir={reports}",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    paths = [str(revision.root), str(revision.root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # each process is judged later, together with the others, and not by the rules of an ini file
    environment = git_free_environment() | {
        "PYTHONPATH": os.pathsep.join(paths), "KV_COMPARE": "off", "KV_FAIL": "off",
    }  # fmt: skip
    folder = revision.root / inside
    if not folder.is_dir():
        raise UserError(f"{revision.label} has no folder {inside}; run ab from a folder that both revisions have")
    with log.open("wb") as output:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    new = set(reports.iterdir()) - known if reports.is_dir() else set()
    # 1: a case failed, which is a result; anything else is none
    if done.returncode not in (0, 1) or not new:
        tail = log.read_text(errors="replace").splitlines()[-_TAIL:]
        said = " | ".join(line.strip() for line in tail if line.strip())
        raise UserError(
            f"{revision.label}: pytest measured nothing (exit code {done.returncode}); its output is in {log}: {said}"
        )


def check_side(side: Side) -> None:
    """Refuse what cannot be judged: too few rounds, or cases measured beside each other.

    Raises
    ------
    UserError
        Naming the argument to drop.
    """
    for run in side.runs:
        for row in run.rows:
            if row.status == "ok" and row.rounds < MIN_ROUNDS:
                raise UserError(
                    f"{side.label}: {row.name} was timed in {row.rounds} rounds, {MIN_ROUNDS} are needed; drop --kv-rounds"
                )
            if int(row.effective.get("concurrent_workers") or 1) > 1:
                raise UserError(f"{side.label}: cases were timed beside each other; drop -n from the pytest arguments")


def read_measured(reports: Path, revision: Revision) -> Side:
    """The processes of one side, judged as one, under the revision's name."""
    side = read_side(str(reports), option=revision.given)
    return Side(revision.label, side.runs, side.notes)
