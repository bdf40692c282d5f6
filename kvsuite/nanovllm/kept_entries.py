"""Entries that processes add to one JSON file of a folder that several users may share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a file; none where it is not there, cannot be read, or is damaged."""
    try:
        found = json.loads(path.read_bytes())
    # of text that is no UTF-8, and of JSON that is none
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def add_entries(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Add entries to those of a file, which may be new, and return all; two processes at once lose nothing.

    Raises
    ------
    OSError
        If the folder cannot be written.
    NotImplementedError
        If its file system knows no locks.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    # whoever may write the folder may wait there
    with FileLock(path.with_name(f".{path.name}.lock"), mode=0o666):
        found = read_entries(path) | dict(entries)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return found
