"""A small file that says what the running case is, for whoever finds its process dead."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class BlackBox:
    """Written by the process that measures, read by another one when that process died or has to.

    Parameters
    ----------
    path
        The file; ``None`` for a box that nobody will read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entry: dict[str, Any] = {}

    @property
    def is_read(self) -> bool:
        """Whether anybody may read it."""
        return self._path is not None

    @property
    def is_open(self) -> bool:
        """Whether a case has begun."""
        return bool(self._entry)

    def begin(self, row: Mapping[str, Any], environment: Mapping[str, Any] | None = None, **more: Any) -> None:
        """A case begins; should its process die, ``row`` is what is known of it.

        Parameters
        ----------
        row
            The record so far.
        environment
            Facts of the run, ``None`` while they are not known.
        more
            Further entries, JSON types.
        """
        self._entry = {
            "id": row["id"],
            "pid": os.getpid(),
            # one clock for all processes of a host, which no time server moves
            "began": time.monotonic(),
            "phase": "setup",
            "row": dict(row),
            "environment": None if environment is None else dict(environment),
            **more,
        }
        self._write()

    def tell(self, **news: Any) -> None:
        """The running case came further: a new ``phase``, ``row`` or ``environment``."""
        if self._entry:
            self._entry |= news
            self._write()

    def written(self) -> None:
        """The row is on the disk. What is left of the case is its teardown, which has as much time for itself."""
        self.tell(phase="teardown", row=None, began=time.monotonic())

    def clear(self) -> None:
        """No case is running."""
        self._entry = {}
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._path is None:
            return
        # by rename: a reader sees the old or the new entry; a full disk costs the entry, not the case
        temporary = self._path.with_suffix(".new")
        with suppress(OSError):
            temporary.write_text(json.dumps(self._entry), encoding="utf-8")
            os.replace(temporary, self._path)


def read_box(path: Path) -> dict[str, Any] | None:
    """The entry in a box, ``None`` if no case is running in its process."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None
