from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.options import devices
from kvsuite.options.devices import resolve_device

INDEXED = ["cuda", "xpu", "vulkan", "metal", "rocm", "opencl"]


@given(st.sampled_from(INDEXED), st.integers(0, 99))
def test_an_index_stays(kind: str, index: int) -> None:
    assert resolve_device(f"{kind}:{index}") == f"{kind}:{index}"


@given(st.sampled_from(INDEXED))
def test_a_bare_kind_is_the_first_one(kind: str) -> None:
    assert resolve_device(kind) == f"{kind}:0"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_devices_without_an_index(device: str) -> None:
    assert resolve_device(device) == device


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux machine with an NVIDIA driver, and a torch folder of which only version.py is read."""
    driver = tmp_path / "nvidia-version"
    driver.write_text("NVRM version: 580.65")
    monkeypatch.setattr(devices, "DRIVER_FILES", (str(driver),))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('must not be loaded')")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


CUDA_BUILD = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
CPU_BUILD = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n"
OLD_STYLE = "__version__ = '2.11.0'\ncuda = '12.8'\n"


@pytest.mark.parametrize(
    ("version", "expected"), [(CUDA_BUILD, "cuda:0"), (OLD_STYLE, "cuda:0"), (CPU_BUILD, "cpu"), ("", "cpu")]
)
def test_auto_takes_a_gpu_that_the_installed_torch_is_built_for(machine: Path, version: str, expected: str) -> None:
    (machine / "torch" / "version.py").write_text(version)
    assert resolve_device("auto") == expected


def test_auto_without_a_driver_is_the_cpu(machine: Path) -> None:
    (machine / "torch" / "version.py").write_text(CUDA_BUILD)
    (machine / "nvidia-version").unlink()
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(("visible", "expected"), [("", "cpu"), ("-1", "cpu"), ("3", "cuda:0"), ("6,3", "cuda:0")])
def test_auto_respects_hidden_gpus(machine: Path, visible: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "torch" / "version.py").write_text(CUDA_BUILD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert resolve_device("auto") == expected


def test_auto_without_torch_is_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(machine / "nothing")])
    assert resolve_device("auto") == "cpu"


def test_auto_on_an_apple_machine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "torch" / "version.py").write_text(CPU_BUILD)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert resolve_device("auto") == "mps"
    assert resolve_device("cpu") == "cpu", "a device that was named is never another one"
