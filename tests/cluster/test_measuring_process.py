"""What a process that measures says of its host before it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvsuite.case import Case
from kvsuite.cluster.measuring_process import _Measuring
from kvsuite.cluster.orders import Setup
from kvsuite.engines.registry import get_engine
from kvsuite.metrics import BUILTIN
from kvsuite.options.resolve import default_options
from kvsuite.survival.black_box import BlackBox


def test_an_engine_that_cannot_be_used_is_named_beside_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = tuple(Case("dse", name, "dummy:tiny", "c", "cpu", "float32") for name in ("hf", "vllm"))
    monkeypatch.setattr(type(get_engine("vllm")), "unavailable", lambda self, device: "vllm is not installed")
    imported: list[str] = []
    for name in ("hf", "vllm"):
        monkeypatch.setattr(type(get_engine(name)), "import_libraries", lambda self: imported.append(self.name))
    setup: dict[str, Any] = {"metrics": BUILTIN, "command": ("pytest",), "folder": str(Path.cwd())}
    ready = _Measuring(Setup(default_options(device="cpu"), planned, **setup), BlackBox(None)).ready()
    assert (ready.refusal, ready.unusable) == (None, {("vllm", "cpu")})
    assert list(ready.environment["engines"]) == ["hf"]
    assert imported == ["hf"], "what can be used has imported its libraries before its first case, once"
    ready = _Measuring(Setup(default_options(device="cpu"), planned[1:], **setup), BlackBox(None)).ready()
    assert ready.refusal == "vllm is not installed"
