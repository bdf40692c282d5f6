"""The groups of options that are installed: ours and those of other packages, by the entry-point group ``kvsuite.options``."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint

from kvsuite.entry_points import OPTIONS, OURS, described, find, load, package, warn
from kvsuite.errors import UserError

from .common import CommonOptions
from .option import Option, OptionGroup, options_in, spellings


@cache
def option_groups() -> tuple[type[OptionGroup], ...]:
    """Every group that can be used; one that cannot is told of on stderr and left out.

    Raises
    ------
    UserError
        If kvsuite's own are not there: it is installed as another version than this one.
    """
    taken: dict[str, str] = {}
    groups: list[type[OptionGroup]] = []
    for entry in find(OPTIONS).values():
        try:
            group = _group(entry)
        except UserError as error:
            if package(entry) == OURS:
                raise
            warn(str(error))
            continue
        names = names_in(group)
        twice = next((name for name in names if name in taken), None)
        if twice is not None:
            warn(f"{described(entry)}: the option {twice} is taken by {taken[twice]}; rename the field")
            continue
        taken |= dict.fromkeys(names, f"{package(entry)} ({entry.value})")
        groups.append(group)
    if CommonOptions not in groups:
        raise UserError(
            "the entry points of kvsuite are not those of this version; install it again (pip install -e .)"
        )
    return tuple(groups)


def _group(entry: EntryPoint) -> type[OptionGroup]:
    group = load(entry)
    if not (isinstance(group, type) and issubclass(group, OptionGroup)):
        raise UserError(f"{described(entry)}: is no subclass of kvsuite.options.option.OptionGroup; name one")
    try:
        options_in(group)
    except Exception as error:  # its annotations are somebody else's too
        raise UserError(f"{described(entry)}: {error}") from error
    return group


def all_options() -> tuple[Option, ...]:
    """The options of every group."""
    return tuple(option for group in option_groups() for option in options_in(group))


def refused_names() -> dict[str, str]:
    """Names that are declared only to be refused, with what does the job."""
    return {name: mend for group in option_groups() for name, mend in group.refused_names.items()}


def names_in(group: type[OptionGroup]) -> list[str]:
    """Every spelling that a group takes."""
    return [name for option in options_in(group) for name in option.spellings] + spellings(*group.refused_names)
