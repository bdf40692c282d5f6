"""Which of FlashInfer's libraries count as built; a stand-in that builds in its way takes its place, so no CUDA is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvsuite.kernel_builds import BUILDS
from kvsuite.nanovllm.flashinfer_libraries import Libraries, built_widths, is_usable, libraries_for

NINJA = """\
rule link
  command = {command}
build {name}.so: link {source}
"""


class Jit:
    """What FlashInfer keeps where: ``fa2`` in float16 of width 64 is ``fa2-float16-64`` in folder and file names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: names whose compiler fails
        self.failing: set[str] = set()
        jit = self

        @dataclass
        class JitSpec:
            name: str
            sources: Any = None
            cflags: Any = None
            cuda_cflags: Any = None
            ldflags: Any = None
            include_dirs: Any = None

            @property
            def ninja_path(self) -> Path:
                return jit.folder / self.name / "build.ninja"

            @property
            def jit_library_path(self) -> Path:
                return jit.folder / self.name / f"{self.name}.so"

            @property
            def is_aot(self) -> bool:
                return (jit.folder / "aot" / self.name).exists()

            @property
            def is_compiled(self) -> bool:
                return self.is_aot or self.jit_library_path.exists()

            def build(self, verbose: bool) -> None:
                self.ninja_path.parent.mkdir(exist_ok=True)
                command = "false" if self.name in jit.failing else "cp $in $out"
                self.ninja_path.write_text(NINJA.format(command=command, name=self.name, source=jit.source(self.name)))
                done = subprocess.run(["ninja", "-C", self.ninja_path.parent], capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"Ninja build failed. Ninja output:\n{done.stdout}")

        self.kind = JitSpec

    def source(self, name: str) -> Path:
        return self.folder / f"{name}.cu"

    def name(self, backend: str, dtype: torch.dtype, *others: Any) -> str:
        return f"{backend}-{str(dtype).removeprefix('torch.')}-{others[3]}"

    def generate(self, *of: Any) -> Any:
        """As FlashInfer: the sources are written, whether or not anybody builds."""
        name = self.name(*of)
        if not self.source(name).exists():
            self.source(name).write_text("kernel")
        return self.kind(name)


@pytest.fixture
def jit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jit:
    if shutil.which("ninja") is None:
        pytest.skip("needs ninja")
    found = Jit(tmp_path)
    package, room = ModuleType("flashinfer"), ModuleType("flashinfer.jit")
    vars(room).update(
        JitSpec=found.kind, gen_batch_prefill_module=found.generate, get_batch_prefill_uri=found.name
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.jit", room)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    monkeypatch.setattr(BUILDS, "done", [])
    return found


def pool(head_dim: int = 64, **group: Any) -> Any:
    described = {"head_dim": head_dim, "window": None, "places": False} | group
    return SimpleNamespace(dtype=torch.float16, device="cuda:0", group=SimpleNamespace(**described))


def built_by_us() -> list[str]:
    assert {one.by for one in BUILDS.done} <= {"flashinfer"}
    return sorted(one.name for one in BUILDS.done)


MISSING, THERE = Libraries(missing="fa3"), Libraries("fa3")


def test_what_is_missing_is_built_where_that_is_asked_for_and_noted_once(jit: Jit) -> None:
    assert libraries_for([pool()], build=False) == MISSING
    assert built_by_us() == []
    assert libraries_for([pool(), pool(window=9)], build=True) == THERE
    assert built_by_us() == ["fa3-float16-64"]
    # it is there now
    assert libraries_for([pool()], build=True) == libraries_for([pool()], build=False) == THERE
    assert len(BUILDS.done) == 1
    # a backend counts where it has every width
    assert libraries_for([pool(), pool(128)], build=False) == MISSING


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "fa2"), ((9, 0), "fa3"), ((10, 0), "fa2")])
def test_a_device_has_one_library(
    jit: Jit, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert libraries_for([pool()], build=False) == Libraries(missing=name)
    assert libraries_for([pool()], build=True) == Libraries(name)
    assert built_by_us() == [f"{name}-float16-64"]


def test_a_library_older_than_its_source_is_not_built(jit: Jit) -> None:
    libraries_for([pool()], build=True)
    source = jit.source("fa3-float16-64")
    source.unlink()
    source.write_text("another kernel")
    assert libraries_for([pool()], build=False) == MISSING
    # whoever loads it all the same has it built, and that is seen
    before = len(BUILDS.done)
    jit.kind("fa3-float16-64").build(verbose=False)
    assert built_by_us()[before:] == ["fa3-float16-64"]
    assert libraries_for([pool()], build=False) == THERE


def test_without_ninja_only_libraries_of_a_package_serve(jit: Jit, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries_for([pool(), pool(128)], build=True)
    (jit.folder / "aot" / "fa3-float16-128").mkdir(parents=True)
    said: list[str] = []
    monkeypatch.setenv("PATH", str(jit.folder))
    with BUILDS.telling(said.append):
        assert libraries_for([pool(128)], build=True) == THERE
        assert libraries_for([pool(), pool(128)], build=False) == MISSING
        assert said == []
        assert libraries_for([pool(), pool(128)], build=True) == MISSING
    assert "nvcc builds 1 libraries" in said[0]
    assert "FlashInfer could not be built: [Errno 2] No such file or directory: 'ninja'" in said[1]


def test_one_that_cannot_be_built_leaves_the_others(jit: Jit) -> None:
    jit.failing.add("fa3-float16-128")
    said: list[str] = []
    with BUILDS.telling(said.append):
        assert libraries_for([pool(), pool(128)], build=True) == MISSING
    assert any(line.startswith("FlashInfer could not be built: Ninja build failed.") for line in said)
    assert built_by_us() == ["fa3-float16-64"]
    assert libraries_for([pool()], build=False) == THERE


def test_libraries_that_may_not_be_looked_at_by_ninja_do_not_serve(jit: Jit, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries_for([pool()], build=True)
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1")
    assert not is_usable(jit.kind("fa3-float16-64"))


def test_looking_for_widths_writes_nothing(jit: Jit) -> None:
    assert built_widths((9, 0)) == []
    assert list(jit.folder.iterdir()) == []
    for name in ("fa2", "fa3"):
        jit.generate(name, torch.bfloat16, *(None, None, None, 128)).build(verbose=False)
    (jit.folder / "aot" / "fa2-bfloat16-64").mkdir(parents=True)
    (jit.folder / "aot" / "fa3-bfloat16-256").mkdir(parents=True)
    before = sorted(jit.folder.rglob("*"))
    assert (built_widths((9, 0)), built_widths((8, 0))) == ([128, 256], [64, 128])
    assert sorted(jit.folder.rglob("*")) == before


def test_without_flashinfer_all_is_missing(jit: Jit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert libraries_for([pool()], build=True) == MISSING
    # nothing takes it
    assert libraries_for([pool(places=True)], build=True) == Libraries()
