"""Tilings kept in a cache folder that several users and processes share."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from kvsuite.nanovllm.kept_entries import add_entries, read_entries


def test_a_file_has_the_mode_that_the_mask_says(tmp_path: Path) -> None:
    path = tmp_path / "tilings" / "card.json"
    before = os.umask(0o027)
    try:
        assert add_entries(path, {"a": None}) == {"a": None}
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert add_entries(path, {"b": {"warps": 4}}) == {"a": None, "b": {"warps": 4}}
    assert read_entries(path) == {"a": None, "b": {"warps": 4}}
    assert not [one for one in path.parent.iterdir() if one != path and not one.name.endswith(".lock")]


@pytest.mark.parametrize("damaged", [b'{"a": "\xff"}', b'{"a": 1', b"[1]", b""])
def test_what_is_damaged_is_none_and_is_written_anew(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(damaged)
    assert read_entries(path) == {}
    add_entries(path, {"b": 1})
    assert read_entries(path) == {"b": 1}


def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "card.json"
    path.mkdir()
    assert read_entries(path) == {}

    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    # root may read everything
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert read_entries(path) == {}


def _add(path: Path, own: int, start: Any) -> None:
    start.wait()
    for at in range(20):
        add_entries(path, {f"{own} {at}": at})


def test_processes_that_keep_at_once_lose_nothing(tmp_path: Path) -> None:
    path, context = tmp_path / "card.json", multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=_add, args=(path, own, start)) for own in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(json.loads(path.read_text())) == 60
