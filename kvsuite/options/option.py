"""What an option is, what a group of them is, and how an option's text is parsed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import msgspec

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible

from .numbers import LEAST_RATIO, MOST_TOKENS, decimal, whole
from .paths import NO_HOME, expanded

_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu|vulkan|metal|rocm|opencl)(:[0-9]{1,7})?")
T = TypeVar("T")
# defaults that do not say what else an option takes
_SHOW_NO_FORM = ("", "auto", "none", "off", "all", "true", "false")
DEVICES = "cpu, cuda[:N], mps, xpu[:N], vulkan[:N], metal[:N], rocm[:N], opencl[:N], auto"


@dataclass(frozen=True)
class Option:
    """One option: the metadata of a field of an `OptionGroup`, whose name is the option's.

    Parameters
    ----------
    parse
        Text to value; raises ValueError or UserError. Knows syntax alone.
    default
        Text, as a user would write it; without any the value is ``None``.
    help
        One or two sentences with an example.
    original
        Default of the original program under ``--kv-preset=original``, where it differs.
    aliases
        Other names.
    example
        Value that error messages show, where neither the default nor the help has one that says enough.
    is_flag
        Whether it takes no value on the command line.
    name
        Without the prefix: ``num-samples`` is ``--kv-num-samples`` and ``kv_num_samples`` in the ini file. The field's.
    """

    parse: Callable[[str], Any]
    default: str
    help: str
    original: str | None = None
    aliases: tuple[str, ...] = ()
    example: str | None = None
    is_flag: bool = False
    name: str = ""

    @property
    def dest(self) -> str:
        """Attribute and ini name: ``kv_num_samples``."""
        return "kv_" + self.field

    @property
    def field(self) -> str:
        """Field of the group: ``num_samples``."""
        return self.name.replace("-", "_")

    @property
    def spellings(self) -> list[str]:
        """All ways to type it, with hyphens and with underscores, aliases included."""
        return spellings(self.name, *self.aliases)

    def refused(self, text: str, detail: str) -> UserError:
        """The error for a value that cannot be: option, value, what is wrong, and an example."""
        example = self.example or self._example_of_help or self.default or "PATH"
        return UserError(
            f"--kv-{self.name}={visible(text, VALUE_LIMIT)}: {detail}; for example --kv-{self.name}={example}"
        )

    @property
    def _example_of_help(self) -> str:
        """What the help types behind the option's name, where the default is a word that shows no form."""
        found = re.search(rf"--kv-{self.name}=(\S+?)[,;:.]?(?:\s|$)", self.help)
        return found[1] if found and self.default in _SHOW_NO_FORM else ""


def spellings(*names: str) -> list[str]:
    """``--kv-a-b`` and ``--kv_a_b`` for every name ``a-b``."""
    typed = [f"--kv-{name}" for name in names]
    return typed + [other for name in typed if (other := "--" + name[2:].replace("-", "_")) not in typed]


class OptionGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Base of a group of options: the fields of a subclass are the resolved values.

    Each field is ``Annotated`` with its type and its `Option`. A package brings a group in by an entry point of the group
    ``kvsuite.options``, in a module that imports nothing of kvsuite but `kvsuite.options`, and reads it by ``options.of``::

        class MyOptions(OptionGroup, frozen=True, kw_only=True):
            my_depth: Annotated[int, Option(whole_number(1), "3", "How deep to look, e.g. --kv-my-depth=4.")]

        options.of(MyOptions).my_depth
    """

    #: options that are named only to be refused: name to what does the job
    refused_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def combine(cls, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        """Values that depend on each other: the fields' values as parsed, to the fields' values.

        Parameters
        ----------
        values
            Parsed values by field.
        given
            Fields that a user set.

        Raises
        ------
        UserError
            If they exclude each other.
        """
        return values


@cache
def options_in(group: type[OptionGroup]) -> tuple[Option, ...]:
    """The options of a group in the order of its fields.

    Raises
    ------
    UserError
        If a field has none.
    """
    found = []
    for name, hint in get_type_hints(group, include_extras=True).items():
        if name in group.__struct_fields__:
            option = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Option)), None)
            if option is None:
                raise UserError(f"{group.__name__}.{name}: has no Option; write {name}: Annotated[type, Option(...)]")
            found.append(replace(option, name=name.replace("_", "-")))
    return tuple(found)


def option_of(group: type[OptionGroup], field: str) -> Option:
    """The option of one field."""
    return next(option for option in options_in(group) if option.field == field)


# parsers


def whole_number(minimum: int, maximum: int = MOST_TOKENS) -> Callable[[str], int]:
    """A whole number from ``minimum`` to ``maximum``."""
    return lambda typed: whole(typed, minimum, maximum)


def outside_brackets(text: str) -> list[str]:
    """Parts between the commas of ``text`` that stand outside of all brackets."""
    depth, parts = 0, [""]
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def list_of(item: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A comma-separated list that names no value twice; commas in brackets separate nothing."""

    def parse(text: str) -> tuple[T, ...]:
        parts = [part.strip() for part in outside_brackets(text) if part.strip()]
        values = tuple(item(part) for part in parts)
        if not values:
            raise ValueError("is empty")
        repeated = [part for at, part in enumerate(parts) if values[at] in values[:at]]
        if repeated:
            raise ValueError(f"names the same value twice, {repeated[0]}")
        return values

    return parse


def ratio(text: str) -> float:
    """A number in (0, 1]."""
    value = _number(text, "must lie in (0, 1]")
    if not 0 < value <= 1:
        raise ValueError("must lie in (0, 1]")
    return _not_nothing(value)


def share(text: str) -> float:
    """A number between 0 and 1."""
    value = _number(text, "must lie between 0 and 1")
    if not 0 < value < 1:
        raise ValueError("must lie between 0 and 1")
    return _not_nothing(value)


def _number(text: str, bounds: str) -> float:
    if text.strip().lower().lstrip("-") in ("nan", "inf"):
        raise ValueError(bounds)
    return decimal(text)


def _not_nothing(value: float) -> float:
    if value < LEAST_RATIO:
        raise ValueError(f"must be at least {LEAST_RATIO:g}; nothing would be left")
    return value


def choice(*choices: str) -> Callable[[str], str]:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"use {', '.join(choices)}")
        return text

    return parse


def switch(text: str) -> bool:
    """On or off."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("use true or false")


def device(text: str) -> str:
    """A device by name, or ``auto``."""
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"unknown device; use {DEVICES}")
    return text


def all_or_number(minimum: int, maximum: int = MOST_TOKENS) -> Callable[[str], int | None]:
    """``all``, which is ``None``, or a whole number from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int | None:
        if text == "all":
            return None
        try:
            return whole(text, minimum, maximum)
        except ValueError as error:
            if str(error) == "not a whole number":
                raise ValueError("neither a whole number nor all") from None
            raise

    return parse


def auto_or(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """``auto``, which is ``None``, or what ``parse`` takes."""
    return lambda typed: None if typed == "auto" else parse(typed)


def off_or(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """``off``, which is ``None``, or what ``parse`` takes."""
    return lambda typed: None if typed.strip() == "off" else parse(typed)


def text(typed: str) -> str:
    """Any text that is not empty."""
    if not typed.strip():
        raise ValueError("is empty")
    return typed.strip()


def path(typed: str) -> str:
    """A path, with the home folder in the place of ``~``."""
    return str(_expanded(text(typed)))


def path_or_name(typed: str) -> str:
    """A name, or a path that stays as typed, because it is a part of what is measured; its ``~`` can be expanded."""
    typed = text(typed)
    _expanded(typed)
    return typed


def _expanded(typed: str) -> Path:
    if "\0" in typed:
        raise ValueError("has a NUL character, which no path can have")
    try:
        return expanded(typed)
    except UserError as error:
        raise ValueError(NO_HOME) from error


def label(typed: str) -> str:
    """A text that stands for something which is not read."""
    if not typed.strip():
        raise ValueError("is empty, and a label is wanted")
    return typed.strip()
