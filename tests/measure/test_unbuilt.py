"""Times of rounds in which a kernel was compiled are no times."""

from __future__ import annotations

import pytest

from kvsuite.errors import CaseInvalid
from kvsuite.kernel_builds import BUILDS
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
        without_builds(plain_rounds)(builds_once, 3)
    assert len(ran) == 3
    without_builds(plain_rounds)(builds_once, 2)
    assert len(ran) == 5
