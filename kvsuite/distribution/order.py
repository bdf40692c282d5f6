"""The order in which the cases of a suite run: rotated by a seed, so that none always runs first and pays for all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

from kvsuite.case import Case

Thing = TypeVar("Thing")


def rotated(cases: Sequence[tuple[Case, Thing]], seed: int) -> list[Thing]:
    """Rotate the models, and each model's cases among themselves: no rotation makes a loaded model be loaded again.

    Parameters
    ----------
    cases
        In the order of their space, each with what is to be ordered.
    seed
        Places to rotate by; a record carries it.
    """
    models = [[thing for _, thing in run] for _, run in itertools.groupby(cases, key=lambda pair: session_key(pair[0]))]
    return [thing for model in _shifted(models, seed) for thing in _shifted(model, seed)]


def _shifted(things: list[Thing], seed: int) -> list[Thing]:
    shift = seed % len(things)
    return things[shift:] + things[:shift]


def session_key(case: Case) -> tuple[str | None, ...]:
    """What consecutive cases share a session by (`kvsuite.engines.registry.SessionPool`)."""
    return case.engine, case.model, case.quantization, case.device, case.dtype
