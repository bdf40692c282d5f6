"""Entries that processes add to one JSON file of a folder that several users may share."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
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
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        found = read_entries(path) | dict(entries)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                json.dump(found, file, indent=1, sort_keys=True)
                file.flush()
                # a temporary file is its owner's alone
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise
    return found


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
