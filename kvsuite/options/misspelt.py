"""Options and variables that nobody reads because their name is misspelt: the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .groups import all_options

_PREFIX = "KV_"
# a name that is less alike is somebody else's
_LIKENESS = 0.8


def misspelt_variables(names: Iterable[str]) -> list[str]:
    """A line for each variable of the environment that is like one of ours, but is none.

    Parameters
    ----------
    names
        Of the variables that are set.
    """
    meant = {option.dest.upper(): option.dest.upper() for option in all_options()}
    meant |= {_variable(alias): option.dest.upper() for option in all_options() for alias in option.aliases}
    lines = []
    for name in sorted(names):
        if not name.upper().startswith(_PREFIX) or name in meant.values():
            continue
        near = difflib.get_close_matches(name.upper(), meant, 1, _LIKENESS)
        if near:
            lines.append(f"{name} in the environment is read by nothing; did you mean {meant[near[0]]}?")
    return lines


def misspelt_options(arguments: Iterable[str]) -> list[str]:
    """``--kv-methd: did you mean --kv-method?`` for each argument that is no option of ours, but is like one."""
    known = [name for option in all_options() for name in option.spellings]
    lines = []
    for argument in arguments:
        name = argument.partition("=")[0]
        if name == "--":
            break
        if not name.startswith(("--kv-", "--kv_")) or name in known:
            continue
        near = difflib.get_close_matches(name, known, 1, _LIKENESS)
        if near:
            lines.append(f"{name}: did you mean {near[0]}?")
    return list(dict.fromkeys(lines))


def _variable(alias: str) -> str:
    return _PREFIX + alias.replace("-", "_").upper()
