"""Signals that end a run: what was finished is reported first, and a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

#: Ctrl-C; of schedulers, timeout(1) and service managers; of a terminal that is closed, an ssh connection that breaks
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
#: seconds in which a further signal is the same one: timeout(1) sends its to the process, then to the process's group
_SAME_S = 1.0


class RunEnded(KeyboardInterrupt):
    """A signal told the run to end. No ``Exception``: nothing that a case runs through takes it for a failure of its own."""


class Signals:
    """A plugin of the process that writes the records.

    Where a signal is ignored, because the parent wants so (``nohup``, a script's ``&``), or handled by somebody else, it stays
    so.
    """

    def __init__(self) -> None:
        #: name of the signal that ends the run
        self.heard: str | None = None
        self._heard_s = 0.0
        self._holds = 0

    def take_over(self, config: pytest.Config) -> None:
        """Let signals end the run from now on, until pytest is done."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            # with --pdb Ctrl-C is the debugger's
            if signal.getsignal(number) is own and not (number == signal.SIGINT and config.getoption("usepdb", False)):
                signal.signal(number, self._hear)
                config.add_cleanup(_restoring(number, own))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.heard is None:
            self.heard, self._heard_s = signal.Signals(number).name, time.monotonic()
            self.check()
        elif time.monotonic() - self._heard_s > _SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raise `RunEnded` once a signal was heard.

        What the handler raises may be lost (in a destructor, in native code that imports a module), so it is asked for again
        wherever a phase or a test begins.
        """
        if self.heard is not None and not self._holds:
            raise RunEnded(self.heard)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that a signal does not cut off: it ends the run behind it."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self.check()

    def pass_on(self, error: BaseException) -> None:
        """Raise what ends the run in the place of an ``error`` of a case, which is that or hides it; return if it does not."""
        if isinstance(error, KeyboardInterrupt):
            return
        self.check()
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, pytest.exit.Exception):
                raise cause
            if isinstance(cause, SystemExit) and _is_of_a_signal(cause):
                # pytest takes SystemExit for a failure of the test
                pytest.exit(f"SystemExit({cause.code!r}) of a signal", returncode=pytest.ExitCode.INTERRUPTED)
            cause = cause.__cause__ or cause.__context__

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Leave out the frames that a signal met between two lines: pytest cannot write them, and ended with an error."""
        # private, but the same since pytest 3; the public ``lineno`` is what fails
        excinfo.traceback = excinfo.traceback.filter(lambda entry: entry._rawentry.tb_lineno is not None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """The reports are written now: a first signal does not cut them off."""
        self._holds += 1
        if self.heard == "SIGHUP":
            _leave_terminal()


def _restoring(number: int, handler: Any) -> Callable[[], None]:
    def restore() -> None:
        signal.signal(number, handler)

    return restore


def _is_of_a_signal(error: SystemExit) -> bool:
    """Whether it was raised in a handler of a signal, not by something that a case called."""
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _leave_terminal() -> None:
    """Write no more to a terminal that is gone: every line would be an error of input and output."""
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
