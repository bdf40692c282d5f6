"""The `--kv-*` options: declared on pytest's parser, resolved with ini twins. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from msgspec import structs

from kvsuite.errors import UserError

from .common import CommonOptions
from .groups import all_options, option_groups, refused_names
from .option import Option, OptionGroup, option_of, options_in, spellings

Group = TypeVar("Group", bound=OptionGroup)


def add_options(parser: Any) -> None:
    """Declare every option and its ini twin on a ``pytest.Parser``."""
    group = parser.getgroup("kvsuite", "kvsuite: quality, memory and speed of LLM KV caches")
    for option in all_options():
        note = f"{option.help} Default: {option.default or 'none'}."
        if option.original is not None:
            note += f" With --kv-preset=original: {option.original}."
        flag: dict[str, Any] = {"action": "store_const", "const": "true"} if option.is_flag else {"metavar": "VALUE"}
        group.addoption(*option.spellings, dest=option.dest, default=None, help=note.replace("%", "%%"), **flag)
        parser.addini(
            option.dest,
            f"ini twin of --kv-{option.name}; as an environment variable {option.dest.upper()}",
            default=None,
        )
    for name, mend in refused_names().items():
        group.addoption(
            *spellings(name), dest=f"kv_rejected_{name}", default=None, nargs="?", const="", metavar="VALUE",
            help=f"Refused: {mend}.",
        )  # fmt: skip


class Options:
    """Resolved values, a struct for each group: command line before environment (``KV_NAME``) before ini before default."""

    def __init__(self, groups: Iterable[OptionGroup], given: frozenset[str]) -> None:
        self._groups: dict[type[OptionGroup], OptionGroup] = {type(group): group for group in groups}
        #: names a user set anywhere
        self.given = given

    def of(self, group: type[Group]) -> Group:
        """The values of one group.

        Raises
        ------
        UserError
            If the group is not installed.
        """
        found = self._groups.get(group)
        if not isinstance(found, group):
            raise UserError(
                f"{group.__module__}:{group.__name__}: these options are not registered; name them in an entry point of "
                "the group kvsuite.options, and install the package again"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON types."""
        return {name: _json(value) for group in self._groups.values() for name, value in structs.asdict(group).items()}


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(one) for one in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def resolve_options(raw: Callable[[str], str | None], ini: Callable[[str], str | None]) -> Options:
    """Resolve every option.

    Parameters
    ----------
    raw, ini
        Command-line and ini text by ``kv_`` name, ``None`` where not given.

    Raises
    ------
    UserError
        Naming the option, the value and the mend.
    """
    for name, mend in refused_names().items():
        if raw(f"kv_rejected_{name}") is not None:
            raise UserError(f"--kv-{name}: {mend}")
    given = {}
    for option in all_options():
        typed = raw(option.dest)
        # an empty variable or ini line is not set, an empty value on the command line is a mistake
        text = (os.environ.get(option.dest.upper()) or ini(option.dest)) if typed is None else typed
        if text or typed is not None:
            given[option.field] = str(text)
    preset = _value(option_of(CommonOptions, "preset"), given, "kvsuite")
    names = frozenset(given)
    groups = []
    for group in option_groups():
        values = {option.field: _value(option, given, preset) for option in options_in(group)}
        groups.append(group(**group.combine(values, names)))
    return Options(groups, names)


def default_options(**overrides: str) -> Options:
    """The defaults, with ``name="text"`` overrides as a user would write them: for use without pytest."""
    unknown = sorted(set(overrides) - {option.field for option in all_options()})
    if unknown:
        raise UserError(f"unknown options {', '.join(unknown)}")
    return resolve_options(lambda dest: overrides.get(dest.removeprefix("kv_")), lambda dest: None)


def _value(option: Option, given: dict[str, str], preset: str) -> Any:
    default = option.original if preset == "original" and option.original is not None else option.default
    text = given.get(option.field, default)
    if not text and option.field not in given:
        return None
    try:
        return option.parse(text)
    except UserError:
        raise
    except ValueError as error:
        detail = str(error)
        if "could not convert" in detail:
            detail = "not a number"
        elif "invalid literal" in detail:
            detail = "not a whole number"
        raise option.refused(text, detail) from error
