"""What packages bring to kvsuite through entry points, kvsuite's own by the same way. Loads none until it is asked for.

One that cannot be used is one line on stderr that names package, object and mend; the others go on working.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from types import MappingProxyType

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible

OURS = "kvsuite"
# the groups: names in them are known without importing anything
OPTIONS, METRICS, POLICIES = "kvsuite.options", "kvsuite.metrics", "kvsuite.policies"
ENGINES, SUITES = "kvsuite.engines", "kvsuite.suites"


@cache
def find(group: str) -> Mapping[str, EntryPoint]:
    """Entry points of a group by name: kvsuite's first, then those of other packages, both in alphabetical order.

    Of two of one name the first stays, and the other is told of (`warn`).
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(
        entry_points(group=group), key=lambda entry: (package(entry) != OURS, package(entry), entry.name)
    ):
        taken = found.setdefault(entry.name, entry)
        if taken is not entry:
            warn(f"{described(entry)}: the name {entry.name} is taken by {package(taken)} ({taken.value}); rename it")
    return MappingProxyType(found)


def load(entry: EntryPoint) -> object:
    """Import what an entry point names.

    Raises
    ------
    UserError
        If that fails, naming package, object and mend.
    """
    try:
        return entry.load()
    except Exception as error:  # the module is somebody else's: anything may happen
        raise UserError(
            f"{described(entry)}: cannot be imported ({in_a_line(error)}); correct it, or uninstall {package(entry)}"
        ) from error


def in_a_line(error: Exception) -> str:
    """An error of somebody else's code as messages name it: its type, and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def package(entry: EntryPoint) -> str:
    """Name of the distribution that brings an entry point."""
    return _name(entry.dist) if entry.dist is not None else "unknown package"


@cache
def _name(distribution: Distribution) -> str:
    # a distribution reads and parses its metadata whenever it is asked
    return distribution.name


def described(entry: EntryPoint) -> str:
    """An entry point as messages name it: package, group, name and object."""
    return f"{package(entry)}: entry point {entry.group}, {entry.name} = {entry.value}"


@cache
def warn(line: str) -> None:
    """Tell, once, of an entry point or a variable that is left out: on stderr, since options have no other place yet."""
    # the controller of xdist has said it
    if "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"kvsuite: warning: {visible(line)}", file=sys.stderr)
