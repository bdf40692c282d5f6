"""On CUDA devices: memory that runs out, errors that outlive a case, workers on GPUs of their own."""

from __future__ import annotations

import pytest
import torch
from pytest_runs import TINY, run_pytest
from sweeps import project

pytest.importorskip("xdist")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = tuple("--kv-device=cuda" if option.startswith("--kv-device") else option for option in TINY)
CONFTEST = """
import torch
from kvsuite.compression import RecentOnly, register_policy


class Hostile(RecentOnly):
    def __init__(self, *, window=3, **common):
        super().__init__(window=window, **common)


@register_policy
class Hungry(Hostile):
    name = "hungry"

    def keep(self, view):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


@register_policy
class Astray(Hostile):
    name = "astray"

    def keep(self, view):
        # an index behind the end stops every later call of this process
        torch.zeros(1, device="cuda")[torch.tensor([10**6], device="cuda")]
        torch.cuda.synchronize()
"""
METHODS = "--kv-method=streaming_llm,hungry,astray"


def test_memory_that_runs_out_and_an_error_that_stays(tmp_path) -> None:
    run = run_pytest(project(tmp_path, CONFTEST), *GPU, METHODS, "-n1")
    rows = run.rows()
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(["baseline", "recent_only_6", "recent_only_10", "streaming_6", "streaming_10"], "ok"),
        "hungry": "oom", "astray": "error",
    }, run.out  # fmt: skip
    assert rows["hungry"]["error"]["type"] == "OutOfMemoryError"
    assert "assert" in rows["astray"]["error"]["message"] or "CUDA error" in rows["astray"]["error"]["message"]
    order = sorted(rows, key=lambda name: rows[name]["order_index"])
    if order[-1] != "astray":
        assert run.said("gets a new process: a CUDA error or a timeout")
    assert not run.said("INTERNALERROR")
    for row in rows.values():
        assert row["effective"]["gpu"]["simulated"] is False
        assert "gpu_processes" in row["effective"]


def test_without_xdist_no_case_follows_a_cuda_error(tmp_path) -> None:
    run = run_pytest(project(tmp_path, CONFTEST), *GPU, METHODS, "-p", "no:benchmark")
    rows = run.rows()
    order = sorted(rows, key=lambda name: rows[name]["order_index"])
    later = order[order.index("astray") + 1 :]
    assert [rows[name]["error"]["type"] for name in later] == ["DevicePoisoned"] * len(later), run.out
    assert len(rows) == 7


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_workers_have_a_gpu_each(tmp_path) -> None:
    run = run_pytest(project(tmp_path), *GPU, "-n2", CUDA_VISIBLE_DEVICES="1,0")
    assert run.code == 0, run.out
    lines = run.lines()
    environments = {line["env"]: line["environment"] for line in lines if line["schema"] == "kvsuite.run/1"}
    cards = {
        (row["effective"]["gpu"]["visible"], environments[row["env"]]["gpu"].get("uuid")) for row in run.rows().values()
    }
    assert {visible for visible, _ in cards} == {"0", "1"}
    assert len({uuid for _, uuid in cards}) == 2, "two entries are two cards"


def test_more_workers_than_gpus_are_refused(tmp_path) -> None:
    run = run_pytest(project(tmp_path), *GPU, "-n2", CUDA_VISIBLE_DEVICES="0")
    assert run.code == pytest.ExitCode.USAGE_ERROR
    assert run.said("two workers on one would time each other; give -n 1")
