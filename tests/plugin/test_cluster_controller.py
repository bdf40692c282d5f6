"""The controller of a cluster without one: what it refuses, and what it says while no worker is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvsuite.distribution.gpus import Gpus
from kvsuite.errors import UserError
from kvsuite.options.resolve import default_options
from kvsuite.plugin.cluster_controller import ClusterController
from kvsuite.plugin.stash import OPTIONS, SIGNALS


def controller(said: list[str], **options: str) -> ClusterController:
    config: Any = SimpleNamespace(
        stash={OPTIONS: default_options(cluster="auto", **options), SIGNALS: SimpleNamespace(check=lambda: None)},
        getoption=lambda name, default: default,
        # asks for no Ray
        option=SimpleNamespace(collectonly=True),
    )
    reporter: Any = SimpleNamespace(
        tell=said.append, note_workers=lambda count: None, counts=dict, seconds_left=None, folder=None
    )
    return ClusterController(config, reporter)


def test_workers_that_start_are_told_of_before_the_first_is_there() -> None:
    said: list[str] = []
    dispatch: Any = SimpleNamespace(workers=0, starting=2, running={}, left=3)
    watching = controller(said, device="cpu")
    for _ in range(2):
        watching._beat(dispatch)
    assert said == ["kvsuite: 0 of 3 done; 2 worker(s) starting; time left unknown"], "once in ten seconds"


def test_cores_of_workers_that_have_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsuite.plugin.cluster_controller.gpus_for", lambda device: Gpus(("0",)))
    with pytest.raises(UserError, match="--kv-cluster-cores=8: workers with a GPU each share the cores of their node"):
        controller([], cluster_cores="8")
