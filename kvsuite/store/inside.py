"""Files that a record names: only such as lie in the run's own folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

_LONGEST = 255  # bytes of a name, on the usual file systems


def inside(folder: Path, name: str) -> Path:
    """Path of the file ``name`` of a run.

    Parameters
    ----------
    folder
        The run's.
    name
        As a record has it: relative, with ``/``.

    Raises
    ------
    ValueError
        If no file of the folder can be meant: an absolute path, one that climbs with ``..`` (even where it comes back, since
        it would not in another folder), one that a link leads out, or a name that no file can have.
    """
    path = PurePosixPath(name)
    if not name or not name.isprintable() or "\\" in name or path.is_absolute() or PureWindowsPath(name).drive:
        raise ValueError("is no name of a file in a run's folder")
    if ".." in path.parts or not path.parts:
        raise ValueError("leads out of the run's folder")
    if any(len(part.encode()) > _LONGEST for part in path.parts):
        raise ValueError("is no name of a file in a run's folder")
    found = folder / path
    try:
        leads_out = not found.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        raise ValueError("cannot be looked up") from error
    if leads_out:
        raise ValueError("leads out of the run's folder")
    return found
