"""Types of arguments on the command line of ``python -m kvsuite``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from kvsuite.errors import UserError
from kvsuite.foreign_text import MESSAGE_LIMIT, VALUE_LIMIT, visible
from kvsuite.options.numbers import decimal, whole
from kvsuite.options.paths import expanded

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse's, but that what was typed steers no terminal and floods none."""

    def error(self, message: str) -> NoReturn:
        super().error(visible(message, MESSAGE_LIMIT))


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A whole number from ``least`` to ``most``."""
    return lambda text: _told(lambda typed: whole(typed, least, most), text)


def number(text: str) -> float:
    """A finite number."""
    return _told(decimal, text)


def path_argument(text: str) -> Path:
    """A path, with the home folder in the place of ``~``."""
    return _told(lambda typed: expanded(typed), text)


def _told(parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except (ValueError, UserError) as error:
        raise argparse.ArgumentTypeError(f"{visible(text, VALUE_LIMIT)}: {error}") from error
