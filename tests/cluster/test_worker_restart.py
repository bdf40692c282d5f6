"""A worker whose process dies while it has nothing to do, or never speaks: before a case began, its row is not marked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvsuite.case import Case
from kvsuite.cluster.orders import Order, Setup
from kvsuite.cluster.worker import Worker
from kvsuite.metrics import BUILTIN
from kvsuite.options.resolve import default_options

#: measures nothing; its first process ends behind the first answer
PROCESS = """
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from kvsuite.cluster.orders import CaseAnswer, Ready
does, ran = {does!r}, Path({ran!r})
channel = Connection(int(sys.argv[-1]))
channel.recv()
if does == "silent":
    channel.recv()
with ran.open("a") as file:
    file.write("x")
channel.send(Ready({{}}, {{}}, None, None))
while True:
    channel.send(CaseAnswer({{"id": channel.recv().id}}, None, {{}}))
    if len(ran.read_text()) == 1:
        break
os._exit(3)
"""


def worker(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Worker:
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\n" + PROCESS.format(does=does, ran=str(folder / "ran")))
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    return Worker(Setup(default_options(), (), BUILTIN, ("pytest",), str(folder)))


def order(name: str) -> Order:
    return Order(Case("s", "e", "m", name, "cpu", "float32"), name, 0)


def test_a_process_that_died_idle_costs_the_next_case_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = worker(tmp_path, monkeypatch, "idle")
    try:
        watched.begin()
        assert watched.measure(order("a")).record == {"id": "a"}
        assert watched._process is not None
        watched._process.wait()
        assert watched.measure(order("b")).record == {"id": "b"}
    finally:
        watched.close()
    assert (tmp_path / "ran").read_text() == "xx"


def test_a_process_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsuite.cluster.worker.BEGIN_S", 0.1)
    watched = worker(tmp_path, monkeypatch, "silent")
    with pytest.raises(RuntimeError, match=r"did not start: it has said nothing for 0\.1 s"):
        watched.begin()
    assert watched._process is None
    answer = watched.measure(order("a"))
    assert answer.record is not None
    assert (answer.record["status"], answer.record["error"]["type"]) == ("crashed", "not started")
