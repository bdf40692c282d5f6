"""Times of rounds in which a kernel was compiled are no times."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvsuite.errors import CaseInvalid
from kvsuite.kernel_builds import BUILDS, KernelBuilds
from kvsuite.measure import unbuilt
from kvsuite.measure.runner import plain_rounds
from kvsuite.measure.unbuilt import without_builds


def test_rounds_that_build_are_refused_and_those_behind_them_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILDS, "done", [])
    ran: list[int] = []

    def builds_once() -> None:
        ran.append(1)
        if len(ran) == 2:
            BUILDS.add("triton", "split_kernel", 0.7)

    with pytest.raises(CaseInvalid, match=r"built 1 kernels \(split_kernel by triton\).*--kv-num-warmup"):
        without_builds(plain_rounds, "cpu")(builds_once, 3)
    assert len(ran) == 3
    without_builds(plain_rounds, "cpu")(builds_once, 2)
    assert len(ran) == 5


def test_triton_is_watched_from_the_first_case_on_cuda_on(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, compilation = ModuleType("triton"), SimpleNamespace(listener=None)
    triton.knobs = SimpleNamespace(compilation=compilation)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(unbuilt, "BUILDS", KernelBuilds())

    def compiles() -> None:
        if compilation.listener is not None:
            found: dict[str, Any] = {
                "src": SimpleNamespace(name="_few_rows_kernel"),
                "times": SimpleNamespace(total=1e6),
            }
            compilation.listener(cache_hit=False, metadata={}, **found)

    without_builds(plain_rounds, "cpu")(compiles, 1)
    assert compilation.listener is None
    # the engine says nothing of it
    with pytest.raises(CaseInvalid, match="_few_rows_kernel by triton"):
        without_builds(plain_rounds, "cuda:1")(compiles, 1)
