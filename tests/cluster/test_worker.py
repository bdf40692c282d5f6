"""A worker and the process below it that measures: each way in which a case can end is a row, and the next case is measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scripted_package import cases, install

from kvsuite.case import Case
from kvsuite.cluster.orders import CaseAnswer, Order, Ready, Setup
from kvsuite.cluster.worker import Worker
from kvsuite.measure.source_hash import source_hash
from kvsuite.metrics import BUILTIN
from kvsuite.options.resolve import default_options
from kvsuite.store.validate import validate

DOES = ["0", "segfault", "0", "fail"]


def measured(folder: Path, does: list[str], timeout: str) -> tuple[Ready, list[CaseAnswer]]:
    """What a worker says of itself and of cases that do this."""
    scripted = cases(len(does), **{f"c{at}": one for at, one in enumerate(does)})
    planned = tuple(
        Case("scripted", "scripted", f"dummy:{one['model']}", one["name"], "cpu", "float32", params=one)
        for one in scripted
    )
    setup = Setup(default_options(timeout=timeout), planned, BUILTIN, ("pytest", "benchmarks"), str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install(folder, scripted)))
        # in this process, where the worker is
        patch.setattr("kvsuite.measure.deadline.GRACE_S", 0.2)
        worker = Worker(setup)
        try:
            return worker.begin(), [
                worker.measure(Order(case, f"t.py::t[{case.id}]", at)) for at, case in enumerate(planned)
            ]
        finally:
            worker.close()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ready, list[CaseAnswer]]:
    # a limit that no busy machine reaches: these cases take no time
    return measured(tmp_path_factory.mktemp("scripted"), DOES, timeout="120")


def test_a_worker_says_what_it_found_around_it(told: tuple[Ready, list[CaseAnswer]]) -> None:
    ready, _ = told
    assert ready.refusal is None
    assert ready.code["kvsuite"] == source_hash()
    assert "scripted-sweep" in ready.code, "packages of others that measure are told of"
    assert ready.environment["command"] == ["pytest", "benchmarks"], "what the user typed"
    assert ready.environment["engines"] == {"scripted": {"scripted": "1"}}
    assert ready.memory_bytes is not None


def test_each_end_of_a_case_is_its_own_row_alone(told: tuple[Ready, list[CaseAnswer]]) -> None:
    _, answers = told
    rows = [answer.record for answer in answers]
    assert all(row is not None for row in rows)
    found = [
        (row["status"], (row["error"] or {}).get("type"), (row["error"] or {}).get("phase")) for row in rows if row
    ]
    assert found == [
        ("ok", None, None), ("crashed", "SIGSEGV", "decode"), ("ok", None, None), ("error", "ValueError", "decode"),
    ]  # fmt: skip
    for place, row in enumerate(rows):
        assert row is not None
        validate("record", row, row["id"])
        assert (row["id"], row["order_index"]) == (f"t.py::t[scripted-c{place}]", place)
        if row["status"] == "ok":
            assert row["metrics"]["kv_bytes_exact"]["value"] == 1000 + place


def test_a_case_that_hears_no_alarm_is_ended_by_its_worker(tmp_path: Path) -> None:
    _, (answer,) = measured(tmp_path, ["hang"], timeout="2")
    hung = answer.record
    assert hung is not None
    validate("record", hung, hung["id"])
    assert (hung["status"], hung["error"]["type"]) == ("crashed", "Timeout")
    assert "did not stop within" in hung["reason"], "nobody inside it heard the alarm"


def test_a_death_costs_a_process_and_an_error_none(told: tuple[Ready, list[CaseAnswer]]) -> None:
    pids = [answer.record["effective"].get("pid") for answer in told[1] if answer.record]
    assert pids[0] != pids[2]
    assert pids[2] == pids[3]
    assert os.getpid() not in pids


def test_a_process_that_cannot_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    worker = Worker(Setup(default_options(), (), BUILTIN, ("pytest",), str(tmp_path)))
    with pytest.raises(RuntimeError, match="did not start: its process ended with exit code 1"):
        worker.begin()


def test_what_fails_before_the_first_case_is_told(tmp_path: Path) -> None:
    worker = Worker(Setup(default_options(), (), ("no metric",), ("pytest",), str(tmp_path)))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="did not start: AttributeError: 'str' object has no attribute 'name'"):
        worker.begin()
