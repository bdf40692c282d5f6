"""``python -m kvsuite.survival.watchdog``: ends a run whose case hears no alarm, and writes that case's row.

A process of its own: native code that holds the interpreter's lock stops every thread of the process that it hangs in.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.measure.deadline import is_overdue, killed
from kvsuite.store.records_file import read_records
from kvsuite.store.store import RecordStore, open_run

from .black_box import read_box
from .death import Cause, crashed_row

_EVERY_S = 0.2
#: a process that was killed has no children any more as soon as its last thread ends, and holds its files a little longer:
#: until its memory, a GPU's too, is given back
_PATIENCE_S = 60.0


def main(box: Path, parent: int, limit_s: float) -> None:
    """Watch a black box until its process is gone.

    Parameters
    ----------
    box
        The parent's black box.
    parent
        Process id of the process that measures, and that started this one.
    limit_s
        Seconds a case.
    """
    # Ctrl-C is for the run; it tells us by ending
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.getppid() == parent:
        time.sleep(_EVERY_S)
        entry = read_box(box)
        if entry is not None and is_overdue(entry, limit_s):
            with suppress(ProcessLookupError):
                os.kill(parent, signal.SIGKILL)
            while os.getppid() == parent:
                time.sleep(0.01)
            _close(entry, read_box(box), limit_s)


def _close(entry: Mapping[str, Any], last: Mapping[str, Any] | None, limit_s: float) -> None:
    if last is None or last["began"] != entry["began"]:
        # it came back in the moment in which it was given up
        _say(f"the run was ended for {entry['id']}; go on with --kv-resume=latest")
        return
    if last["row"] is None:
        _say(
            f"{last['id']}: its teardown ran longer than --kv-timeout={limit_s:g} s, and the run was ended; the "
            "row of the case is written; go on with --kv-resume=latest"
        )
        return
    row = crashed_row(last, Cause("Timeout", killed(limit_s)))
    try:
        folder = write_row(last, row)
    except UserError as error:
        _say(f"{row['id']}: {row['reason']}; its row could not be written: {error}")
        return
    _say(
        f"{row['id']}: {row['reason']}. Its row is in {folder}; go on with --kv-resume={folder}, and with -n 1 if a "
        "case may hang, so that only its worker is killed"
    )


def _say(line: str) -> None:
    print(f"kvsuite: {visible(line)}", file=sys.stderr)


def write_row(entry: Mapping[str, Any], row: dict[str, Any]) -> Path:
    """Append a row to the run that the dead process was writing, or would have begun; return its folder.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    opening = entry["opening"]
    if entry["folder"] is not None:
        store = RecordStore.reopen(Path(entry["folder"]), patience_s=_PATIENCE_S)
    else:
        store = open_run(
            Path(opening["base"]),
            method=opening["method"],
            model=opening["model"],
            started=datetime.fromisoformat(opening["started"]),
            facts=opening["facts"],
        )
    with store:
        store.with_session(read_records(store.folder)[0], opening["facts"])
        store.append(row)
    return store.folder


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    main(Path(arguments["box"]), int(arguments["parent"]), float(arguments["limit_s"]))
