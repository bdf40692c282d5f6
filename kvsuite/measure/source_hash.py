"""Hashes of the code that measures: other code is another measurement."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path


@functools.cache
def source_hash() -> str:
    """Hash of kvsuite's own source."""
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return "sha256:" + total.hexdigest()


def code_hashes(root: Path, ids: Iterable[str], more: Iterable[str] = ()) -> dict[str, str]:
    """Hashes by name of all code that decides what the cases of a run measure.

    Parameters
    ----------
    root
        pytest's root folder.
    ids
        Node ids of the cases; their files count, and every ``conftest.py`` from there up to ``root``, because policies and
        hooks of users live there.
    more
        Names of further files below ``root``: those of an earlier run.

    Returns
    -------
    dict
        ``"kvsuite"`` and the files' paths below ``root``, each with ``sha256:<hex>``.
    """
    files = {root / name for name in more}
    for name in {node_id.partition("::")[0] for node_id in ids}:
        path = root / name
        files.add(path)
        files.update(folder / "conftest.py" for folder in path.parents if folder.is_relative_to(root))
    found = {
        path.relative_to(root).as_posix(): "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.is_file() and path.is_relative_to(root)
    }
    return {"kvsuite": source_hash()} | found
