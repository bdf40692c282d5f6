from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kvsuite.__main__ import main

_WITHOUT_FLASHINFER = """
import sys
from kvsuite.__main__ import main
from kvsuite.nanovllm import cuda_runner
from kvsuite.nanovllm.flashinfer_libraries import Libraries

cuda_runner.libraries_for = lambda pools, build: Libraries()
sys.exit(main(sys.argv[1:]))
"""


def test_json_with_a_self_test(capsys, tmp_path):
    assert main(["doctor", "--json", "--seconds", "0.1", "--report-dir", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "kvsuite.doctor/1"
    assert found["works"] is True
    assert set(found["sections"]) == {"Machine", "GPUs", "Packages", "Engines and parts"}
    noise = found["noise"]["cpu"]
    assert noise["rounds"] >= 3
    assert noise["verdict"].split(":")[0] in ("quiet", "noisy", "too noisy for times")
    (folder,) = [line for line in found["sections"]["Machine"] if line["part"] == "report folder"]
    assert str(tmp_path) in folder["found"]


def test_a_broken_installation_is_exit_code_1_and_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert main(["doctor", "--no-self-test"]) == 1
    out = capsys.readouterr().out
    assert "kvsuite cannot run: jsonschema broken" in out
    assert "Noise" not in out


@pytest.mark.parametrize("seconds", ["0", "-1", "601", "nan"])
def test_a_length_that_is_none(capsys, seconds):
    assert main(["doctor", f"--seconds={seconds}"]) == 4
    assert "--seconds=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prepare", "--kv-device=cpu"], "--prepare: builds kernels for CUDA, and --kv-device=cpu needs none"),
        (["--prepare", "--json"], "--json: is of the diagnosis"),
        (["--prepare", "--no-self-test"], "--no-self-test: is of the diagnosis"),
        (["--prepare", "--seconds=abc"], "--seconds=abc: is of the diagnosis"),
        (["--prepare", "--seconds=5"], "--seconds=5: is of the diagnosis"),
        (["--prepare", "--kv-report-dir=/nonexistent"], "--kv-report-dir=/nonexistent: is of the diagnosis"),
        (["--prepare", "--dtype=float32"], "error: --dtype=float32: kernels are built for bfloat16 and float16 alone"),
        (["--prepare", "--kv-dtype=float32"], "error: --kv-dtype=float32: kernels are built for"),
        (["--kv-model=smollm2"], "error: --kv-model=smollm2: says what --prepare builds for; give --prepare too"),
        (["--device=cpu"], "error: --device=cpu: says what --prepare builds for"),
    ],
)
def test_what_cannot_be_prepared(capsys, options, words):
    assert main(["doctor", *options]) == 4
    assert words in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_are_prepared(capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    # nvcc takes minutes, which is FlashInfer's affair
    from kvsuite.nanovllm import cuda_runner
    from kvsuite.nanovllm.flashinfer_libraries import Libraries

    monkeypatch.setattr(cuda_runner, "libraries_for", lambda pools, build: Libraries())
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path))
    assert main(["doctor", "--prepare", "--kv-model", "dummy:Qwen3-0.6B"]) == 0
    first = capsys.readouterr()
    assert "tilings of 20 products" in first.out
    assert "building kernels" in first.err
    assert list((tmp_path / "tilings").iterdir())
    # a later process finds all of it on the disk
    command = [
        sys.executable, "-c", _WITHOUT_FLASHINFER, "doctor", "--prepare", "--kv-model", "dummy:Qwen3-0.6B"
    ]  # fmt: skip
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "nothing was missing" in again.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_tested_too(capsys):
    code = main(["doctor", "--json", "--seconds", "1"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["works"] else 1)
    assert set(found["noise"]) == {"cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))}
    assert found["gpus"]
