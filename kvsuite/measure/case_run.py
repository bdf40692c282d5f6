"""CaseRun: what a suite is given to measure one case with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.meters.clock import Clock
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.workloads.texts import TextSource

from .measurement import Measurement

RunRounds = Callable[[Callable[[], None], int], None]


class PhaseProgress(Protocol):
    """Is told how far a phase came."""

    def __call__(self, phase: str, done: int, of: int, note: str = "") -> None: ...


@dataclass
class CaseRun:
    """The surroundings of one case.

    Parameters
    ----------
    case
        The case.
    options
        Of the run.
    found
        What was found so far; passes fill it.
    texts
        Prompts and texts, shared by the cases of a run.
    planned
        All cases of the run, in the order of their space.
    progress
        Is told how far a phase came.
    rounds
        Runs timed rounds: ``rounds(one_round, count)``.
    clock
        Makes the clock of a device.
    beside
        Loads a second session, which the caller closes: `SessionPool.beside`.
    begins
        Is told the name of a phase that begins.
    applied
        Takes over what the engine applied, before work at whose failure that has to be in the record already.
    """

    case: Case
    options: Options
    found: Measurement
    texts: TextSource
    planned: Sequence[Case]
    progress: PhaseProgress
    rounds: RunRounds
    clock: Callable[[Any], Clock]
    beside: Callable[..., Session]
    begins: Callable[[str], None]
    applied: Callable[[], None]

    @property
    def common(self) -> CommonOptions:
        """The options that all suites read."""
        return self.options.of(CommonOptions)

    def phase(self, name: str) -> None:
        """Say that a phase begins: what was found so far is kept, and a failure from now on is one of this phase."""
        self.begins(name)


class MeasuresCases(Protocol):
    """The half of a suite that measures (`kvsuite.suites.suite.Suite`)."""

    def refuse(self, case: Case, options: Options) -> None:
        """Refuse before a model is loaded what is known to be impossible."""

    def needs(self, case: Case) -> tuple[type, ...]:
        """Capabilities that the case cannot do without."""

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        """Measure the case on a session that is prepared for it."""
