"""What a run that goes on says of itself, for another shell: a small file in its folder, and the one line made of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.store.files import write_atomic
from kvsuite.store.records_file import RECORDS_FILE, read_records

from .progress import about

STATUS_FILE = "status.json"
#: rows of which status are no failure
_WELL = ("ok", "skipped", "invalid")
#: a file that was not written for so long is of a process that is gone, or hangs
_STALE_S = 60.0


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Parameters
    ----------
    counts
        Finished cases by status.
    left
        Cases without a row.
    running
        Cases that are being measured, by node.
    starting
        Workers that have not begun.
    seconds_left
        Expected, ``None`` where nothing tells.
    """

    counts: Mapping[str, int]
    left: int
    running: Mapping[str, int]
    starting: int
    seconds_left: float | None

    def line(self) -> str:
        """``12 of 60 done, 1 failed; running: a (10.0.0.1, 3f2a) 2; about 3 min left``."""
        parts = [done_of(self.counts, sum(self.counts.values()) + self.left)]
        if self.running:
            parts.append("running: " + ", ".join(f"{node} {count}" for node, count in sorted(self.running.items())))
        if self.starting:
            parts.append(f"{self.starting} worker(s) starting")
        if self.left:
            parts.append("time left unknown" if self.seconds_left is None else f"{about(self.seconds_left)} left")
        return visible("; ".join(parts))


def done_of(counts: Mapping[str, int], total: int | None) -> str:
    """``12 of 60 done, 1 failed``."""
    done = sum(counts.values())
    failed = sum(count for status, count in counts.items() if status not in _WELL)
    return f"{done}{'' if total is None else f' of {total}'} done{f', {failed} failed' if failed else ''}"


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the status of a run; a folder that cannot be written costs the status, not the run."""
    with suppress(UserError):
        write_atomic(folder / STATUS_FILE, json.dumps(asdict(status)).encode())


def clear_status(folder: Path) -> None:
    """The run is over."""
    with suppress(OSError):
        (folder / STATUS_FILE).unlink(missing_ok=True)


def read_status(folder: Path) -> tuple[RunStatus, float] | None:
    """The status of a run and its age in seconds; ``None`` where there is none, or it cannot be read."""
    path = folder / STATUS_FILE
    try:
        found = RunStatus(**json.loads(path.read_text(encoding="utf-8")))
        return found, max(time.time() - path.stat().st_mtime, 0.0)
    except (OSError, ValueError, TypeError):
        return None


def status_line(folder: Path, report: str) -> str:
    """The line of a run that goes on, or what is known of one that does not.

    Parameters
    ----------
    folder
        Of the run.
    report
        Name of the file that is written into it when the run is over.

    Raises
    ------
    UserError
        If its records cannot be read.
    """
    found = read_status(folder)
    if found is not None:
        status, age = found
        if age < _STALE_S:
            return status.line()
        known = done_of(status.counts, sum(status.counts.values()) + status.left)
        return visible(f"{known}; not heard of for {about(age)[6:]}; go on with --kv-resume={folder}")
    run, rows, _ = read_records(folder)
    # of two rows of a case the last one counts
    counts = Counter({row["id"]: row["status"] for row in rows}.values())
    total = run.get("cases")
    left = isinstance(total, int) and total > sum(counts.values())
    known = done_of(counts, total if left else None)
    # one that goes on has no second process to write it
    return visible(f"{known}; go on with --kv-resume={folder}" if left and _is_over(folder, report) else known)


def _is_over(folder: Path, report: str) -> bool:
    """Whether the report was written after the last row."""
    try:
        return (folder / report).stat().st_mtime_ns >= (folder / RECORDS_FILE).stat().st_mtime_ns
    except OSError:
        return False
