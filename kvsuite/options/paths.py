"""Paths as people type them: ``~`` is the home folder, or an error; never a folder of that name."""

from __future__ import annotations

from pathlib import Path

from kvsuite.errors import UserError

NO_HOME = "no home folder is known for it; give the whole path"


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder in the place of ``~`` or ``~user`` at its beginning.

    Raises
    ------
    UserError
        If there is no such user, or the user has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {NO_HOME}") from error
