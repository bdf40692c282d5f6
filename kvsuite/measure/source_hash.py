"""Hashes of the code that measures: other code is another measurement."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import EntryPoint
from pathlib import Path
from types import CodeType

from kvsuite.case import Case
from kvsuite.entry_points import ENGINES, OURS, POLICIES, SUITES, find, package

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
def source_hash(folder: Path = Path(__file__).parents[1]) -> str:
    """Hash of the code of kvsuite that measures, without comments, docstrings and layout.

    What draws, reports, compares or talks to pytest is not in it, so that a run can be gone on with after an edit there.
    Compiling all files takes most of a second: for the same bytes it is read from where Python keeps what it compiled.
    """
    files = {path.relative_to(folder).as_posix(): path for path in _measuring(folder)}
    written = hashlib.sha256(sys.version.encode())
    for name, path in files.items():
        written.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    known = Path(importlib.util.cache_from_source(str(folder / "measuring.py"))).with_suffix(".sha256")
    if (found := _known(known, written.hexdigest())) is not None:
        return found
    total = hashlib.sha256()
    for name, path in files.items():
        total.update(name.encode() + b"\0" + _content(path))
    found = "sha256:" + total.hexdigest()
    if not sys.dont_write_bytecode:
        _keep(known, f"{written.hexdigest()} {found}\n")
    return found


def _known(path: Path, written: str) -> str | None:
    """The hash that was found for these bytes, ``None`` where the last ones were others."""
    try:
        last, found = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return found if last == written else None


def _keep(path: Path, line: str) -> None:
    """Write a file that no reader sees in parts; a folder that cannot be written costs time alone."""
    beside = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(line, encoding="ascii")
        beside.replace(path)


def others_code(cases: Iterable[Case]) -> dict[str, str]:
    """Hashes of the packages of others whose suites, engines and policies measure ``cases``, by the packages' names."""
    entries = {
        package(entry): entry
        for case in cases
        for group, name in ((SUITES, case.suite), (ENGINES, case.engine), (POLICIES, case.policy))
        if name is not None and (entry := find(group).get(name)) is not None
    }
    return {name: _package_hash(entry) for name, entry in sorted(entries.items()) if name != OURS}


@functools.cache
def _package_hash(entry: EntryPoint) -> str:
    """Hash of all code of the distribution that brings ``entry``, whether it was copied or is used where it is written."""
    total = hashlib.sha256()
    for name, path in sorted(_files_of(entry).items()):
        total.update(name.encode() + b"\0" + _content(path))
    return "sha256:" + total.hexdigest()


def _files_of(entry: EntryPoint) -> dict[str, Path]:
    found = {}
    if entry.dist is not None:
        found = {one.as_posix(): Path(str(one.locate())) for one in entry.dist.files or ()}
    # an editable installation lists none of its own
    top = entry.module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    # one without an origin is a name space, in which others have packages too
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    if origin is not None and origin.name == "__init__.py":
        found |= {f"{top}/{path.relative_to(origin.parent).as_posix()}": path for path in origin.parent.rglob("*")}
    elif origin is not None:
        found[origin.name] = origin
    suffixes = (".py", *EXTENSION_SUFFIXES)
    return {name: path for name, path in found.items() if name.endswith(suffixes) and path.is_file()}


def _content(path: Path) -> bytes:
    """What a file does: of Python without docstrings, comments and layout, and without assertions, which compute nothing."""
    content = path.read_bytes()
    if path.suffix != ".py":
        return content
    try:
        return _executed(compile(content, "", "exec", dont_inherit=True, optimize=2)).encode()
    except (SyntaxError, ValueError):  # a template of somebody else's, or for another Python
        return content


def _measuring(folder: Path) -> Iterator[Path]:
    for room in _MEASURING:
        for path in sorted((folder / room).rglob("*.py")):
            shows = path.name in _SHOWING or "figures" in path.relative_to(folder).parts
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


def code_hashes(
    root: Path, ids: Iterable[str], more: Iterable[str] = (), *, cases: Iterable[Case] = ()
) -> dict[str, str]:
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
    cases
        The cases: packages of others that bring what measures them count.

    Returns
    -------
    dict
        ``"kvsuite"``, names of packages of others, and the files' paths below ``root``, each with ``sha256:<hex>``.
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
    return {"kvsuite": source_hash()} | others_code(cases) | found
