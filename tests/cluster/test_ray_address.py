"""What is asked before and beside Ray, which would wait for minutes or end the process: who answers, and whose a signal is."""

from __future__ import annotations

import os
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

import pytest

from kvsuite.cluster import ray_cluster
from kvsuite.cluster.ray_cluster import RayCluster, _address, _handlers_kept, _Head, unreachable
from kvsuite.errors import UserError


def test_where_an_address_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert _address("ray://head:10001", lambda: None) == "head:10001"
    assert _address("ray://[::1]:10001", lambda: None) == "[::1]:10001"
    assert _address("local", lambda: "10.0.0.1:6379") is None
    assert _address("auto", lambda: None) is None, "no cluster runs on this host"
    assert _address("auto", lambda: "10.0.0.1:6379") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert _address("auto", lambda: "10.0.0.1:6379") == "10.0.0.2:6379"


def test_an_address_where_nobody_answers_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # bound and not listening: nobody else gets the port
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", there)
        cluster = object.__new__(RayCluster)
        with pytest.raises(UserError) as error:
            cluster._connect("auto", None)
        assert str(error.value).startswith(
            f"--kv-cluster=auto: nothing answers at {there} (Connection refused); start one"
        )
        silent.listen()
        assert unreachable(there, 5.0) is None


def test_a_head_that_is_silent_for_long_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[float] = [0.0]
    said: list[str | None] = [None]
    monkeypatch.setattr("kvsuite.cluster.ray_cluster.time.monotonic", lambda: now[0])
    monkeypatch.setattr("kvsuite.cluster.ray_cluster.unreachable", lambda *_: said[0])
    head = _Head("head:6379")
    assert head.answers()
    said[0] = "refused"
    assert not head.answers()
    now[0] = ray_cluster._SILENT_S - 1
    assert not head.answers(), "one that is started again is waited for"
    said[0] = None
    assert head.answers()
    said[0] = "refused"
    assert not head.answers()
    now[0] += ray_cluster._SILENT_S
    with pytest.raises(UserError, match=r"head:6379 is gone \(refused\); .*--kv-resume=latest"):
        head.answers()


class Heard(BaseException):
    """What a handler of the run raises."""


def test_sigterm_while_ray_holds_its_handler_goes_to_the_runs() -> None:
    def of_run(number: int, frame: FrameType | None) -> NoReturn:
        raise Heard

    def of_ray(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(number)

    def connect() -> None:
        with _handlers_kept():
            signal.signal(signal.SIGTERM, of_ray)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, of_run)
    try:
        with pytest.raises(Heard):
            connect()
        assert signal.getsignal(signal.SIGTERM) is of_run
    finally:
        signal.signal(signal.SIGTERM, before)
