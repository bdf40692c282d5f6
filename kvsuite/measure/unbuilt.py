"""Timed rounds in which nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable

from kvsuite.errors import CaseInvalid
from kvsuite.kernel_builds import BUILDS

from .case_run import RunRounds


def without_builds(run_rounds: RunRounds, device: str) -> RunRounds:
    """``run_rounds`` that refuses rounds in which this process built a kernel: their time is the compiler's.

    Whichever engine has them: what Triton compiles is noted from the first case on CUDA on.

    Parameters
    ----------
    run_rounds
        What runs the rounds.
    device
        Of the case.

    Raises
    ------
    CaseInvalid
        Behind such rounds.
    """

    if device.startswith("cuda"):
        BUILDS.watch_triton()

    def run(round_: Callable[[], None], rounds: int) -> None:
        before = len(BUILDS.done)
        run_rounds(round_, rounds)
        if built := BUILDS.done[before:]:
            names = ", ".join(dict.fromkeys(f"{one.name} by {one.by}" for one in built))
            raise CaseInvalid(
                f"timed rounds built {len(built)} kernels ({names}), so their times say nothing; they are built now: measure "
                "again, and on a new machine with a warm-up, which builds them before (--kv-num-warmup=1 or more)"
            )

    return run
