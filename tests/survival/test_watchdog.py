"""A process that hangs in native code with the interpreter's lock held is ended, and its case has a row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from child_processes import child_process

from kvsuite.case import Case, digest
from kvsuite.record import Record
from kvsuite.store.records_file import read_records
from kvsuite.store.store import RecordStore, open_run
from kvsuite.survival.watchdog import write_row

# a lock that is taken twice never comes back, and no signal ends it; PyDLL keeps the interpreter's lock
_HANGING = """
import ctypes, json, os, subprocess, sys
from pathlib import Path
from kvsuite.survival.black_box import BlackBox

told = json.loads(sys.argv[1])
path = Path(told["box"])
box = BlackBox(path)
box.begin(told["row"])
box.tell(phase="decode", **told["where"])
limit = told["limit_s"]
arguments = json.dumps({"box": str(path), "parent": os.getpid(), "limit_s": limit})
subprocess.Popen([sys.executable, "-m", "kvsuite.survival.watchdog", arguments])
library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)
"""
ENVIRONMENT = {"host": "h"}
FACTS = {"command": ["pytest"], "options": {}, "environment": ENVIRONMENT, "seed": 0}


def row(name: str) -> dict[str, Any]:
    case = Case("dse", "nano", "dummy:tiny", name, "cpu", "float32", workload={"protocol": "serving"})
    return Record(case, f"b.py::t[{name}]", env=digest(ENVIRONMENT), started_utc="2026-01-01").to_dict()


def hanging(tmp_path: Path, where: dict[str, Any]) -> list[str]:
    # the grace is over at once: what is tested is the end
    told = {"box": str(tmp_path / "box.json"), "row": row("hangs"), "where": where, "limit_s": -5.0}
    return [sys.executable, "-c", _HANGING, json.dumps(told)]


def hang(tmp_path: Path, where: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(hanging(tmp_path, where), capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("begun", [True, False], ids=["a run with rows", "no run yet"])
def test_the_row_is_written_by_another_process(tmp_path: Path, begun: bool) -> None:
    base = tmp_path / "reports"
    started = datetime(2026, 1, 1)
    opening = {"method": "dse", "model": "tiny", "facts": FACTS}
    where: dict[str, Any] = {"folder": None, "opening": opening | {"base": str(base), "started": started.isoformat()}}
    if begun:
        with open_run(base, started=started, **opening) as store:  # type: ignore[arg-type]
            store.append(row("before"))
        # the process died while it wrote
        with store.path.open("ab") as file:
            file.write(b'{"schema": "kvsuite.rec')
        where = {"folder": str(store.folder), "opening": {"facts": FACTS}}
    done = hang(tmp_path, where)
    assert done.returncode == -9
    assert "b.py::t[hangs]: timeout: it ran longer than" in done.stderr
    (folder,) = base.iterdir()
    assert f"Its row is in {folder}" in done.stderr
    run, rows, notes = read_records(folder)
    assert run["run_id"] == folder.name
    assert [(one["case"]["name"], one["status"]) for one in rows] == [("before", "ok")] * begun + [("hangs", "crashed")]
    assert rows[-1]["error"]["phase"] == "decode"
    assert not notes


def test_a_file_that_the_dying_process_still_holds_is_waited_for(tmp_path: Path) -> None:
    with open_run(tmp_path, started=datetime(2026, 1, 1), method="dse", model="tiny", facts=FACTS) as store:  # type: ignore[arg-type]
        store.append(row("before"))
    where = {"folder": str(store.folder), "opening": {"facts": FACTS}}
    # in the place of a thread of the killed process, which gives back memory before it closes its files
    holder = RecordStore.reopen(store.folder)
    with child_process(hanging(tmp_path, where), stderr=subprocess.PIPE, text=True) as process:
        process.wait()
        time.sleep(1.5)
        holder.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert f"Its row is in {store.folder}" in said
    assert [one["status"] for one in read_records(store.folder)[1]] == ["ok", "crashed"]


def test_a_row_of_another_environment_brings_its_run_line(tmp_path: Path) -> None:
    with open_run(tmp_path, started=datetime(2026, 1, 1), method="dse", model="tiny", facts=FACTS) as store:  # type: ignore[arg-type]
        store.append(row("before"))
    again = {"host": "h", "command": ["pytest", "--kv-resume=latest"]}
    entry = {"folder": str(store.folder), "opening": {"facts": FACTS | {"environment": again}}}
    for name in ("hangs", "hangs too"):
        write_row(entry, row(name) | {"env": digest(again)})
    run, rows, _ = read_records(store.folder)
    assert [session["environment"] for session in run["sessions"]] == [again]
    assert {one["env"] for one in rows} == {run["env"], run["sessions"][0]["env"]}


def test_a_disk_that_takes_no_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    opening = {"method": "dse", "model": "m", "facts": FACTS, "base": str(tmp_path / "taken"), "started": "2026-01-01"}
    done = hang(tmp_path, {"folder": None, "opening": opening})
    assert done.returncode == -9
    assert "its row could not be written: --kv-report-dir" in done.stderr
    assert "Traceback" not in done.stderr
