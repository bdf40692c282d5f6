"""How long a process was kept from a CPU, and how fast the CPU was."""

from __future__ import annotations

import platform
import threading
import time
from typing import Any

import pytest

from kvsuite.meters import host_load
from kvsuite.meters.host_load import busy_words, probe_seconds, waited_seconds, watched


def measured(
    monkeypatch: pytest.MonkeyPatch, before: dict[str, float], after: dict[str, float]
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What is put, with its facts, for rounds of a scripted second, between these waits."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    waits, clock, steal = iter([before, after]), iter([10.0, 11.0]), iter([1.0, 1.05])
    probes = iter([[0.004, 0.005], [0.008, 0.009]])
    monkeypatch.setattr(host_load, "waited_seconds", lambda: next(waits))
    monkeypatch.setattr(host_load, "stolen_seconds", lambda: next(steal))
    monkeypatch.setattr(host_load, "probe_seconds", lambda: next(probes))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    ran: list[int] = []
    run = watched(
        lambda round_, rounds: ran.append(rounds), lambda name, value, **facts: found.update({name: (value, facts)})
    )
    run(lambda: None, 3)
    monkeypatch.undo()
    assert ran == [3]
    return found


def share(*given: Any) -> Any:
    return measured(*given)["host_wait_share"][0]


def test_the_most_delayed_thread_counts_and_what_the_hypervisor_took(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share(monkeypatch, {"1": 5.0, "2": 0.0}, {"1": 5.1, "2": 0.3, "new": 9.0}) == pytest.approx(0.35)


def test_it_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share(monkeypatch, {"1": 0.0}, {"1": 7.0}) == 1.0


def test_a_kernel_without_the_account_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share(monkeypatch, {}, {}) is None


def test_the_probe_is_of_before_and_after_and_names_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    value, facts = measured(monkeypatch, {}, {})["host_probe_s"]
    assert value == [0.004, 0.005, 0.008, 0.009]
    assert facts["protocol"] == f"{platform.python_implementation()} {platform.python_version()}"


def test_a_probe_is_the_time_of_each_of_its_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0 + 0.5 * tick**2 for tick in range(11)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert probe_seconds() == [0.5 * (2 * tick + 1) for tick in range(10)]


@pytest.mark.skipif(not waited_seconds(), reason="no schedstat here")
def test_threads_that_fight_for_a_cpu_wait() -> None:
    import os

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        before = waited_seconds()
        enough = threading.Event()

        def busy() -> None:
            # long enough without the interpreter's lock to be two processes for the scheduler
            import hashlib

            data = bytes(1_000_000)
            while not enough.is_set():
                hashlib.sha256(data)

        threads = [threading.Thread(target=busy) for _ in range(3)]
        for thread in threads:
            thread.start()
        # they go on until they have waited, or for a minute if they never do
        for _ in range(600):
            time.sleep(0.1)
            new = [seconds for thread, seconds in waited_seconds().items() if thread not in before]
            if len(new) >= 3 and sum(new) > 0.1:
                break
        enough.set()
        for thread in threads:
            thread.join(60)
    finally:
        os.sched_setaffinity(0, allowed)
    assert len(new) >= 3
    assert sum(new) > 0.1


def test_a_busy_machine_is_told_from_a_quiet_one() -> None:
    quiet, uneven = [0.004] * 10, [0.004] * 9 + [0.009]
    assert busy_words(0.9, 2, quiet) is None
    assert busy_words(1.2, 2, quiet) is None, "one process is this one"
    assert busy_words(None, 2, quiet) is None, "a system without a load"
    assert busy_words(9.4, 2, quiet) == "load 9.4 on 2 cores"
    assert busy_words(9.4, 64, quiet) is None
    assert (
        busy_words(0.2, 2, uneven)
        == "a fixed loop of the interpreter takes up to 125% longer from one time to the next"
    )
    assert busy_words(9.4, 2, uneven) == f"load 9.4 on 2 cores, {busy_words(0.2, 2, uneven)}"
