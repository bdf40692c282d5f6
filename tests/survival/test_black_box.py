"""The box is whole or not there, whoever reads it and whenever."""

from __future__ import annotations

import os
import time
from pathlib import Path

from kvsuite.survival.black_box import BlackBox, read_box


def test_an_entry_is_there_while_the_case_runs(tmp_path: Path) -> None:
    path = tmp_path / "gw0.json"
    box = BlackBox(path)
    assert read_box(path) is None
    before = time.monotonic()
    box.begin({"id": "a", "status": "ok"})
    entry = read_box(path)
    assert entry is not None
    assert (entry["id"], entry["phase"], entry["pid"], entry["environment"]) == ("a", "setup", os.getpid(), None)
    assert before <= entry["began"] <= time.monotonic()
    box.tell(phase="decode", environment={"host": "h"})
    told = read_box(path)
    assert told == entry | {"phase": "decode", "environment": {"host": "h"}}
    box.clear()
    assert read_box(path) is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_told_between_cases(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "box.json")
    box.tell(phase="decode")
    assert not box.is_open
    assert list(tmp_path.iterdir()) == []
    box.clear()


def test_a_box_that_nobody_reads_writes_nothing() -> None:
    box = BlackBox(None)
    assert not box.is_read
    box.begin({"id": "a"})
    box.tell(phase="load")
    box.clear()


def test_a_folder_that_is_gone_costs_the_entry_and_not_the_case(tmp_path: Path) -> None:
    box = BlackBox(tmp_path / "gone" / "box.json")
    box.begin({"id": "a"})
    box.clear()


def test_what_is_no_entry_is_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "\0\0"):
        (tmp_path / "box.json").write_text(text)
        assert read_box(tmp_path / "box.json") is None
