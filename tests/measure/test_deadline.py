"""An alarm stops what listens to it, once, and leaves nothing behind."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from pathlib import Path

import pytest

from kvsuite.measure.deadline import GRACE_S, CaseTimeout, alarm, is_overdue


def test_a_block_is_stopped_in_the_middle() -> None:
    reached = []

    def work() -> None:
        with alarm(0.05):
            reached.append("begun")
            time.sleep(60)
            reached.append("ended")

    with pytest.raises(CaseTimeout):
        work()
    assert reached == ["begun"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_no_handler_of_errors_swallows_it() -> None:
    def careless() -> None:
        with alarm(0.05):
            try:
                time.sleep(60)
            except Exception:
                time.sleep(60)

    with pytest.raises(CaseTimeout):
        careless()


@pytest.mark.parametrize("imports", [True, False])
def test_it_knows_whether_it_cut_off_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imports: bool) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def work() -> None:
        with alarm(0.05):
            if imports:
                importlib.import_module("slow_to_import")
            time.sleep(60)

    with pytest.raises(CaseTimeout) as caught:
        work()
    assert caught.value.importing is imports


def test_a_block_in_time_is_left_alone_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with alarm(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_a_limit_or_in_a_thread_nothing_is_set() -> None:
    with alarm(None):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    seen: list[object] = []

    def work() -> None:
        with alarm(60):
            seen.append(signal.getitimer(signal.ITIMER_REAL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert seen == [(0.0, 0.0)]


def test_overdue_begins_after_the_grace() -> None:
    now = time.monotonic()
    assert not is_overdue({"began": now - 10}, 10.0)
    assert is_overdue({"began": now - 10 - GRACE_S}, 9.9)
