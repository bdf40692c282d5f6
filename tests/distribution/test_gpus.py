"""Workers get the caller's GPUs, in the caller's order, one each."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.distribution.gpus import SIMULATED, VISIBLE, Gpus, gpus_for, named_entry, require_gpu_each, visible_entries
from kvsuite.errors import UserError


@pytest.mark.parametrize(
    ("listed", "entries"),
    [
        ("6,3", ("6", "3")),
        (" 6 , 3 ", ("6", "3")),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",)),
        ("0,-1,2", ("0",)),
        ("1,1,2", ("1",)),
        ("", ()),
        ("-1", ()),
    ],
)
def test_the_callers_list_is_read_as_cuda_reads_it(listed: str, entries: tuple[str, ...]) -> None:
    assert visible_entries(8, listed) == entries


@given(st.text(max_size=20), st.integers(0, 4))
def test_any_list_gives_distinct_entries(listed: str, count: int) -> None:
    entries = visible_entries(count, listed)
    assert len(set(entries)) == len(entries)
    assert all(entry and not entry.startswith("-") for entry in entries)


def test_without_a_list_gpus_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    assert visible_entries(3) == ("0", "1", "2")
    assert named_entry("cuda:2") == "2"
    monkeypatch.setenv(VISIBLE, "6,3")
    assert named_entry("cuda:1") == "3"
    assert named_entry("cuda:5") == "5", "which CUDA refuses by itself"


def test_workers_are_spread_over_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SIMULATED, raising=False)
    monkeypatch.setenv(VISIBLE, "6,3")
    assert gpus_for("cpu") is None
    assert gpus_for("vulkan:0") is None
    assert gpus_for("cuda") == Gpus(("6", "3"))
    assert gpus_for("cuda:1") == Gpus(("3",))


def test_simulated_gpus_are_cpus_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATED, "2")
    monkeypatch.delenv(VISIBLE, raising=False)
    assert gpus_for("cpu") == Gpus(("0", "1"), simulated=True)
    with pytest.raises(UserError, match="simulated GPUs are CPUs"):
        gpus_for("cuda:0")
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv(SIMULATED, wrong)
        with pytest.raises(UserError, match="must be a number of GPUs"):
            gpus_for("cpu")


def test_more_workers_than_gpus_are_refused() -> None:
    two = Gpus(("6", "3"))
    require_gpu_each(None, "cpu", 64)
    require_gpu_each(two, "cuda", 2)
    require_gpu_each(Gpus(()), "cuda", 1)
    with pytest.raises(UserError, match=r"-n 3: there are 2 GPUs to see \(6, 3\).* give -n 2"):
        require_gpu_each(two, "cuda", 3)
    with pytest.raises(UserError, match=r"--kv-device=cuda:1 names one GPU.* give --kv-device=cuda"):
        require_gpu_each(Gpus(("3",)), "cuda:1", 2)


def test_a_process_is_bound_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "from kvsuite.distribution.gpus import Gpus, bind\n"
        "print(bind(Gpus(('6', '3')), 1), os.environ['CUDA_VISIBLE_DEVICES'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["3", "3", "False"]
