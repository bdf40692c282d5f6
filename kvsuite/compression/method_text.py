"""Methods with parameters as typed: ``snapkv(window=32,keep_ratio=[0.2,0.5])``."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, get_type_hints

from kvsuite.errors import UserError
from kvsuite.options.numbers import MOST_SEED, decimal, whole
from kvsuite.options.option import outside_brackets

from .base import Policy

_METHOD = re.compile(r"\s*([\w:.-]+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_TYPES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


@dataclass(frozen=True)
class MethodText:
    """A method as typed.

    Parameters
    ----------
    name
        The policy, or ``kvpress:<Name>``.
    values
        The values of each parameter that was given, as text; several where a list was given.
    typed
        All of it, for messages.
    """

    name: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    typed: str = ""

    @classmethod
    def parse(cls, typed: str) -> MethodText:
        """Read a method.

        Raises
        ------
        UserError
            For parentheses or brackets that are not closed, a parameter without a value, or one that is given twice.
        """
        found = _METHOD.fullmatch(typed)
        if found is None or (found[2] is None and any(sign in typed for sign in "()[]=")):
            raise _wrong(typed, "is no method with parameters")
        values: dict[str, tuple[str, ...]] = {}
        for part in filter(str.strip, outside_brackets(found[2] or "")):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not name.isidentifier() or not value:
                raise _wrong(typed, f"{part.strip()!r} is no parameter with its value")
            if name in values:
                raise _wrong(typed, f"{name} is given twice")
            if value[0] == "[":
                if value[-1] != "]":
                    raise _wrong(typed, f"the list of {name} is not closed")
                values[name] = tuple(one.strip() for one in value[1:-1].split(",") if one.strip())
            else:
                values[name] = (value,)
            if not values[name]:
                raise _wrong(typed, f"the list of {name} is empty")
        return cls(found[1], values, typed)

    def variants(self, types: Mapping[str, type | None]) -> Iterator[dict[str, Any]]:
        """Every combination of the given values, the last parameter varying fastest.

        Parameters
        ----------
        types
            Type of each parameter that the method has; ``None`` where it says none.

        Raises
        ------
        UserError
            For a parameter that the method has not, or a value of another type.
        """
        for name in self.values:
            if name not in types:
                near = get_close_matches(name, types, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise _wrong(
                    self.typed, f"{self.name} has no parameter {name}", f"{hint}it has {', '.join(types) or 'none'}"
                )
        read = [[self._value(name, text, types[name]) for text in texts] for name, texts in self.values.items()]
        for chosen in itertools.product(*read):
            yield dict(zip(self.values, chosen, strict=True))

    def _value(self, name: str, text: str, wanted: type | None) -> Any:
        value = _literal(text)
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is not None and type(value) is not wanted:
            raise _wrong(self.typed, f"{name}={text} is not {_TYPES.get(wanted, wanted.__name__)}")
        return value


def parameter_types(policy: type[Policy]) -> dict[str, type | None]:
    """Types of a policy's own parameters by name: from its annotations, else from the defaults."""
    common = {"self", "positions", "skip_layers"}
    try:
        hints = get_type_hints(policy.__init__)
    except (NameError, TypeError):  # a user's annotations may name what only a type checker sees
        hints = {}
    found: dict[str, type | None] = {}
    for name, parameter in inspect.signature(policy.__init__).parameters.items():
        if name in common or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint, default = hints.get(name), parameter.default
        if hint not in _TYPES:
            hint = type(default) if type(default) in _TYPES else None
        found[name] = hint
    return found


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (_whole, decimal):
        try:
            return read(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _whole(text: str) -> int:
    return whole(text, -MOST_SEED, MOST_SEED)


def _wrong(
    typed: str, what: str, mend: str = "for example --kv-method='snapkv(window=32,keep_ratio=[0.2,0.5])'"
) -> UserError:
    return UserError(f"--kv-method={typed}: {what}; {mend}")
