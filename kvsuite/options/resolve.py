"""The `--kv-*` options: declared from their table, resolved with ini twins. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible

from .option import Option
from .table import FLAGS, OPTIONS, REJECTED

# the original's way to name a weight format
_SWITCHES = {"load_in_4bit": "4bit", "load_in_8bit": "8bit", "fake_q3bit": "fake_q3"}
_BY_DEST = {option.dest: option for option in OPTIONS}


def add_options(parser: Any) -> None:
    """Declare every option and its ini twin on a ``pytest.Parser``."""
    group = parser.getgroup("kvsuite", "kvsuite: quality, memory and speed of LLM KV caches")
    for option in OPTIONS:
        names = [f"--kv-{name}" for name in (option.name, *option.aliases)]
        names += [spelling for name in names if (spelling := "--" + name[2:].replace("-", "_")) not in names]
        note = f"{option.help} Default: {option.default or 'none'}."
        if option.original is not None:
            note += f" With --kv-preset=original: {option.original}."
        flag: dict[str, Any] = (
            {"action": "store_const", "const": "true"} if option.name in FLAGS else {"metavar": "VALUE"}
        )
        group.addoption(*names, dest=option.dest, default=None, help=note.replace("%", "%%"), **flag)
        parser.addini(
            option.dest, f"ini twin of {names[0]}; as an environment variable {option.dest.upper()}", default=None
        )
    for name, mend in REJECTED.items():
        spellings = [f"--kv-{name}", f"--kv_{name.replace('-', '_')}"]
        group.addoption(
            *spellings, dest=f"kv_rejected_{name}", default=None, nargs="?", const="", metavar="VALUE",
            help=f"Refused: {mend}.",
        )  # fmt: skip


class Options:
    """Resolved values as attributes: command line before environment (``KV_NAME``) before ini before default."""

    def __init__(self, values: dict[str, Any], given: frozenset[str]) -> None:
        self._values = values
        #: names a user set anywhere
        self.given = given

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._values.items()}


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
    for name, mend in REJECTED.items():
        if raw(f"kv_rejected_{name}") is not None:
            raise UserError(f"--kv-{name}: {mend}")
    given = {}
    for dest in _BY_DEST:
        typed = raw(dest)
        # an empty variable or ini line is not set, an empty value on the command line is a mistake
        text = (os.environ.get(dest.upper()) or ini(dest)) if typed is None else typed
        if text or typed is not None:
            given[dest] = str(text)
    preset = _parse(_BY_DEST["kv_preset"], given.get("kv_preset", "kvsuite"))
    values: dict[str, Any] = {}
    for dest, option in _BY_DEST.items():
        default = option.original if preset == "original" and option.original is not None else option.default
        text = given.get(dest, default)
        values[dest.removeprefix("kv_")] = _parse(option, text) if text or dest in given else None
    values["quantization"] = _one_format(values, given)
    return Options(values, frozenset(dest.removeprefix("kv_") for dest in given))


def _one_format(values: dict[str, Any], given: dict[str, str]) -> tuple[str, ...] | None:
    """Weight formats, with the original's three switches, of which one at most may be on."""
    switched = [name for name in _SWITCHES if values[name]]
    chosen = switched + ["quantization"] * ("kv_quantization" in given)
    if len(chosen) > 1:
        typed = " and ".join(f"--kv-{name.replace('_', '-')}" for name in chosen)
        listed = (values["quantization"] or ()) if "kv_quantization" in given else ()
        wanted = ",".join(dict.fromkeys((*listed, *(_SWITCHES[name] for name in switched))))
        raise UserError(f"{typed}: one of them hides the other; to run several formats give --kv-quantization={wanted}")
    return (_SWITCHES[switched[0]],) if switched else values["quantization"]


def default_options(**overrides: str) -> Options:
    """The defaults, with ``name="text"`` overrides as a user would write them: for use without pytest."""
    unknown = sorted(set(overrides) - {dest.removeprefix("kv_") for dest in _BY_DEST})
    if unknown:
        raise UserError(f"unknown options {', '.join(unknown)}")
    return resolve_options(lambda dest: overrides.get(dest.removeprefix("kv_")), lambda dest: None)


def _parse(option: Option, text: str) -> Any:
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
        raise UserError(f"--kv-{option.name}={visible(text, VALUE_LIMIT)}: {detail}; {_mend(option)}") from error


def _mend(option: Option) -> str:
    return f"for example --kv-{option.name}={option.example or option.default or 'PATH'}"


def names(options: Iterable[Option] = OPTIONS) -> list[str]:
    """Every option as typed, for tests and docs."""
    return [f"--kv-{option.name}" for option in options]
