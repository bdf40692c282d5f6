"""Files that are whole or not there: atomic writes, strict JSON."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from kvsuite.errors import UserError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old or the new one, never a part: temporary file, fsync, rename.

    Text is encoded by `utf8`.

    Raises
    ------
    UserError
        If the folder cannot be written.
    """
    data = utf8(content) if isinstance(content, str) else content
    temporary: str | None = None
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(
            f"cannot write {path} ({error.strerror}); give a folder that can be written (--kv-report-dir, --out)"
        ) from error


def utf8(text: str) -> bytes:
    """UTF-8 of any text: lone surrogates, by which Python names files that are not UTF-8, as escapes that JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def parse_json(data: bytes) -> Any:
    """Parse strict JSON: ``ValueError`` for NaN and the infinities, which Python would accept, and for endless nesting."""
    import msgspec

    # three times as fast; what it refuses, lone surrogates of file names among it, Python reads or says what is wrong
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        return msgspec.json.decode(data)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def sync_folder(folder: Path) -> None:
    """Make the names of new files in ``folder`` survive a power loss."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
