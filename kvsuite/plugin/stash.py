"""What the plugin keeps between hooks, in ``config.stash``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvsuite.case import Case
    from kvsuite.distribution.gpus import Gpus
    from kvsuite.measure.runner import CaseRunner, Measured
    from kvsuite.options.resolve import Options
    from kvsuite.survival.black_box import BlackBox

    from .arrived_rows import ArrivedRows
    from .signals import Signals

OPTIONS: pytest.StashKey[Options] = pytest.StashKey()
#: by suite and id
CASES: pytest.StashKey[dict[tuple[str, str], Case]] = pytest.StashKey()
#: begin of a parameter that stands for a suite which cannot be used; the rest says why
UNUSABLE = "unusable: "
#: a line for every suite that was collected and is no part of a bare run
UNASKED: pytest.StashKey[list[str]] = pytest.StashKey()
#: the selected cases, in the order of their space
PLANNED: pytest.StashKey[Sequence[Case]] = pytest.StashKey()
ORDER_SEED: pytest.StashKey[int] = pytest.StashKey()
RUNNER: pytest.StashKey[CaseRunner | ArrivedRows] = pytest.StashKey()
#: what gives a test its row where workers of a cluster measure
CLUSTER: pytest.StashKey[ArrivedRows] = pytest.StashKey()
MEASURED: pytest.StashKey[Measured] = pytest.StashKey()
#: why the run cannot go on, found by a worker of xdist
USAGE_ERROR: pytest.StashKey[str] = pytest.StashKey()
#: GPUs of the files that --benchmark-compare named
SAVED_GPUS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
#: place of each collected case in the order of the run, by node id; cases of an earlier run keep theirs
PLACES: pytest.StashKey[dict[str, int]] = pytest.StashKey()
#: names of the cases that an earlier run has finished
FINISHED: pytest.StashKey[frozenset[str]] = pytest.StashKey()
#: what to say of the run that goes on
RESUMED: pytest.StashKey[str | None] = pytest.StashKey()
BOX: pytest.StashKey[BlackBox] = pytest.StashKey()
SIGNALS: pytest.StashKey[Signals] = pytest.StashKey()
#: the GPUs that workers are spread over, and the one that this worker is bound to
GPUS: pytest.StashKey[Gpus | None] = pytest.StashKey()
BOUND_GPU: pytest.StashKey[str] = pytest.StashKey()


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is an xdist worker: its records are written by the controller."""
    return hasattr(config, "workerinput")


def worker_input(config: pytest.Config) -> dict[str, Any]:
    """What the controller told this worker, ``{}`` elsewhere."""
    found: dict[str, Any] = getattr(config, "workerinput", {})
    return found
