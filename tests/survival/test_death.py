"""A dead process's exit status in words, and the row of its case."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvsuite.case import Case
from kvsuite.record import Record
from kvsuite.store.validate import validate
from kvsuite.survival.black_box import BlackBox, read_box
from kvsuite.survival.death import cause_of, crashed_row


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", "ended by SIGKILL (signal 9); the kernel sends"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "ended by SIGSEGV (signal 11)"),
        ("import os; os.abort()", "SIGABRT", "ended by SIGABRT (signal 6)"),
        ("import os; os._exit(3)", "exit code 3", "ended with exit code 3 in the middle of the case"),
        ("", "exit code 0", "ended with exit code 0 in the middle of the case"),
    ],
)  # fmt: skip
def test_how_a_process_ended(code: str, kind: str, said: str) -> None:
    cause = cause_of(
        subprocess.run([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL, timeout=60).returncode
    )
    assert cause.kind == kind
    assert said in cause.reason


def test_what_is_not_known_is_said() -> None:
    assert "not known" in cause_of(None).reason
    assert cause_of(-1000).kind == "signal 1000"


def test_the_row_of_the_case_keeps_what_was_known(tmp_path) -> None:
    case = Case("dse", "nano", "dummy:tiny", "point", "cpu", "float32", workload={"protocol": "serving"})
    box = BlackBox(tmp_path / "box.json")
    box.begin(Record(case, "b.py::t[point]", order_index=3, started_utc="2026-01-01").to_dict())
    box.tell(phase="decode")
    entry = read_box(tmp_path / "box.json")
    assert entry is not None
    row = crashed_row(entry, cause_of(-11))
    validate("record", row, "row")
    assert (row["status"], row["order_index"], row["error"]["type"]) == ("crashed", 3, "SIGSEGV")
    assert row["error"]["phase"] == "decode"
    assert row["reason"] == row["error"]["message"]
    assert row["duration_s"] >= 0
