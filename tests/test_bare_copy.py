"""What tests give a tree that is not installed is what installing it gives."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution
from pathlib import Path

import bare_copy
import pytest


def test_a_bare_copy_has_the_entry_points_of_pyproject(tmp_path: Path) -> None:
    bare_copy.write_metadata(tmp_path)
    found = Distribution.at(tmp_path / "kvsuite-0.dist-info")
    entries = {(entry.group, entry.name): entry.value for entry in found.entry_points}
    assert found.name == "kvsuite"
    assert entries["pytest11", "kvsuite"] == "kvsuite.plugin"
    assert entries["kvsuite.engines", "nano"] == "kvsuite.engines.nano.engine:NanoEngine"
    assert any(line.startswith("torch") for line in found.requires or ())


def test_an_installed_tree_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.path)
    # by now there is metadata of one kind or the other
    bare_copy.make_findable()
    assert sys.path == before
