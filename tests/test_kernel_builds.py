"""What this process had to build is noted, and said once."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvsuite.kernel_builds import FLASHINFER_INSTALL, KernelBuild, KernelBuilds, mend_line


def test_a_line_is_said_once_and_where_it_is_wanted() -> None:
    builds, usual, elsewhere = KernelBuilds(), list[str](), list[str]()
    builds.say = usual.append
    builds.once("waits")
    with builds.telling(elsewhere.append):
        builds.once("waits")
        builds.once("waits longer")
        builds.say("again")
        builds.say("again")
    builds.once("at last")
    assert (usual, elsewhere) == (["waits", "at last"], ["waits longer", "again", "again"])


def test_what_triton_compiles_is_noted_and_what_it_finds_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    triton, knobs = ModuleType("triton"), SimpleNamespace(compilation=SimpleNamespace(listener=None))
    knobs.compilation.listener = lambda **given: heard.append(given["src"].name)
    triton.knobs = knobs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    builds = KernelBuilds()
    builds.watch_triton()
    # a second time changes nothing
    builds.watch_triton()
    for name, found in (("split", False), ("split", True), ("merge", False)):
        knobs.compilation.listener(
            src=SimpleNamespace(name=name), cache_hit=found, times=SimpleNamespace(total=500_000), metadata={}
        )
    assert builds.done == [KernelBuild("triton", "split", 0.5), KernelBuild("triton", "merge", 0.5)]
    # whoever listened before goes on listening
    assert heard == ["split", "split", "merge"]


def test_without_triton_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    builds = KernelBuilds()
    builds.watch_triton()
    assert builds.done == []


def test_a_line_that_nobody_was_shown_is_said_again() -> None:
    builds, shown = KernelBuilds(), list[str]()
    with builds.telling(lambda line: False):
        builds.once("waits")
    with builds.telling(shown.append):
        builds.once("waits")
        builds.once("waits")
    assert shown == ["waits"]


def test_the_line_that_mends_is_of_this_model_and_installs_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    prepare = "python -m kvsuite doctor --prepare --kv-model='my model' --kv-device=cuda:1 --kv-dtype=float16"
    of = ("my model", "cuda:1", "float16")
    assert mend_line("tilings of products of 16 rows", *of) == prepare
    assert mend_line("flashinfer fa2", *of) == f"{FLASHINFER_INSTALL}; then {prepare}"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(name=name))
    assert mend_line("flashinfer fa2", *of) == prepare
