"""Runs on a cluster whose two workers take turns in the controller's process: all of it is real but Ray and the processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_runs import NO_FIGURES, TINY, TINY_NAMES, Run, copy_benchmarks, run_pytest

CONFTEST = (
    NO_FIGURES
    + """
import os
import signal

import pytest

from kvsuite.cluster import ray_cluster
from kvsuite.cluster.measuring_process import _Measuring
from kvsuite.cluster.orders import CaseAnswer, Node
from kvsuite.survival.black_box import BlackBox

DOES = os.environ.get("DOES", "")


class ThisProcess:
    def __init__(self, address, setup, **places):
        self.measuring = _Measuring(setup, BlackBox(None))
        self.workers, self.measured, self.said, self.orders = 0, 0, [], []

    def nodes(self):
        return [Node("f00d", "here", "127.0.0.1", 2)]

    def start(self, node):
        self.workers += 1
        self.said.append((self.workers, self.measuring.ready()))
        return self.workers

    def give(self, worker, order):
        self.orders.append((worker, order))

    def news(self, timeout_s):
        if self.said:
            return self.said.pop(0)
        if not self.orders:
            return None
        worker, order = self.orders.pop(0)
        self.measured += 1
        if self.measured > 2:
            if DOES == "refuse":
                return worker, CaseAnswer(None, None, self.measuring.environment, usage_error="the disk is full")
            if DOES == "end":
                os.kill(os.getpid(), signal.SIGTERM)
        return worker, self.measuring.measure(order)

    def stop(self, worker):
        pass

    def close(self):
        self.measuring.close()


ray_cluster.RayCluster = ThisProcess
ray_cluster.require_ray = lambda address: None


def pytest_collection_modifyitems(items):
    for item in items:
        if DOES == "skip" and "streaming_6" in item.name:
            item.add_marker(pytest.mark.skip(reason="planted"))


def pytest_runtest_call(item):
    if DOES == "fail":
        raise AssertionError("planted")
"""
)


def on_cluster(folder: Path, *more: str, **env: str) -> Run:
    if not folder.exists():
        copy_benchmarks(folder, conftest=CONFTEST)
    return run_pytest(folder, *TINY, "--kv-cluster=auto", "-p", "no:cacheprovider", "-p", "no:benchmark", *more, **env)


def test_each_row_says_where_it_was_measured_and_a_skipped_test_has_none(tmp_path: Path) -> None:
    run = on_cluster(tmp_path / "p", DOES="skip", KVSUITE_SIMULATED_GPUS="2")
    assert run.code == 0, run.out
    assert run.said("4 passed, 1 skipped")
    rows = run.rows()
    assert set(rows) == {*TINY_NAMES} - {"streaming_6"}
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["effective"]["node"] == {"name": "here", "ip": "127.0.0.1", "id": "f00d"}
        assert row["effective"]["gpu"]["simulated"] is True
        assert "simulated GPU: measured on the CPU" in row["warnings"]
    beside = [row for row in rows.values() if row["effective"]["concurrent_workers"] == 2]
    assert beside
    assert all(any("beside 1 other worker(s) of its node" in said for said in row["warnings"]) for row in beside)


def test_a_run_that_is_ended_goes_on_with_what_has_no_row(tmp_path: Path) -> None:
    run = on_cluster(tmp_path / "p", DOES="end")
    assert run.code == pytest.ExitCode.INTERRUPTED, run.out
    assert run.said("go on by the same command with --kv-resume=latest")
    first = run.rows()
    assert len(first) in (2, 3), "the case that was being measured may end"
    again = on_cluster(tmp_path / "p", "--kv-resume=latest")
    assert again.code == 0, again.out
    rows = again.rows()
    assert set(rows) == {*TINY_NAMES}
    assert {name: rows[name] for name in first} == first, "what had a row was not measured again"


@pytest.mark.parametrize(
    ("does", "code", "told", "rows"),
    [
        ("refuse", pytest.ExitCode.USAGE_ERROR, "the disk is full", 2),
        ("fail", pytest.ExitCode.TESTS_FAILED, "stopping after 1 failures", 0),
    ],
)
def test_what_ends_a_run(tmp_path: Path, does: str, code: int, told: str, rows: int) -> None:
    run = on_cluster(tmp_path / "p", "-x", DOES=does)
    assert run.code == code, run.out
    assert run.said(told), run.out
    assert len(run.rows() if run.reports else ()) == rows
