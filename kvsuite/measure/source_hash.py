"""Hashes of the code that measures: other code is another measurement."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

#: rooms whose code decides what numbers come out
_MEASURING = (
    "compression", "engines", "measure", "memory_model", "meters", "models", "nanovllm", "quantization", "suites", "workloads",
)  # fmt: skip
#: files of a suite, and the folder of its figures, that only show what was measured
_SHOWING = frozenset(
    {
        "captions.py", "columns.py", "csv_files.py", "figure.py", "files.py", "generic.py", "outputs.py", "panels.py",
        "results_json.py", "rows.py", "table.py",
    }
)  # fmt: skip


@functools.cache
def source_hash(package: Path = Path(__file__).parents[1]) -> str:
    """Hash of the code of kvsuite that measures, without comments, docstrings and layout.

    What draws, reports, compares or talks to pytest is not in it, so that a run can be gone on with after an edit there.
    """
    total = hashlib.sha256()
    for path in _measuring(package):
        # without docstrings, comments and layout, and without assertions, which compute nothing
        code = compile(path.read_bytes(), "", "exec", dont_inherit=True, optimize=2)
        total.update(path.relative_to(package).as_posix().encode() + b"\0" + _executed(code).encode())
    return "sha256:" + total.hexdigest()


def _measuring(package: Path) -> Iterator[Path]:
    for room in _MEASURING:
        for path in sorted((package / room).rglob("*.py")):
            shows = path.name in _SHOWING or "figures" in path.relative_to(package).parts
            if not (room == "suites" and shows):
                yield path


def _executed(code: CodeType) -> str:
    """What Python makes of a file, but for where each line of it stood."""
    constants = [
        _executed(one)
        if isinstance(one, CodeType)
        # a set has another order in every process
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    shape = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    return repr((code.co_name, code.co_code, code.co_exceptiontable, names, shape, constants))


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
