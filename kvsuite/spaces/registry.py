"""Suites by name: which space gives their cases, and how a run of theirs is named."""

from __future__ import annotations

from collections.abc import Callable

from kvsuite.case import Case
from kvsuite.errors import UserError
from kvsuite.options import Options

from .compression import compression_cases, method_name

SPACES: dict[str, Callable[[Options], list[Case]]] = {"compression": compression_cases}
RUN_NAMES: dict[str, Callable[[Options], str]] = {"compression": method_name}


def cases_of(suite: str, options: Options) -> list[Case]:
    """Cases of ``suite`` in the space's order.

    Raises
    ------
    UserError
        For an unknown suite, or options that give no case.
    """
    if suite not in SPACES:
        raise UserError(f"kv_suite({suite!r}): unknown suite; known: {', '.join(sorted(SPACES))}")
    cases = SPACES[suite](options)
    if not cases:
        raise UserError(f"suite {suite}: the options leave no case; drop --kv-no-baseline or name a --kv-method")
    return cases
