"""Timed rounds in which nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable

from kvsuite.errors import CaseInvalid
from kvsuite.kernel_builds import BUILDS

from .case_run import RunRounds


def without_builds(run_rounds: RunRounds) -> RunRounds:
    """``run_rounds`` that refuses rounds in which this process built a kernel: their time is the compiler's.

    Raises
    ------
    CaseInvalid
        Behind such rounds.
    """

    def run(round_: Callable[[], None], rounds: int) -> None:
        before = len(BUILDS.done)
        run_rounds(round_, rounds)
        if built := BUILDS.done[before:]:
            names = ", ".join(dict.fromkeys(f"{one.name} by {one.by}" for one in built))
            raise CaseInvalid(
                f"timed rounds built {len(built)} kernels ({names}), so their times say nothing; they are built now: measure "
                "again, and with a warm-up (--kv-num-warmup) on a machine that is new"
            )

    return run
