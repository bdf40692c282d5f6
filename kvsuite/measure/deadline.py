"""Time limits of cases: an alarm in the measuring process, and the rule by which another process ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

#: seconds after the limit in which a case may still stop by itself; then its process is killed
GRACE_S = 5.0


class CaseTimeout(BaseException):
    """The running case took too long. No ``Exception``: nothing that a case runs through may swallow it.

    Parameters
    ----------
    importing
        Whether it cut off an import: what was half imported cannot be imported again in this process.
    """

    def __init__(self, importing: bool = False) -> None:
        super().__init__()
        self.importing = importing


@contextmanager
def alarm(limit_s: float | None) -> Iterator[None]:
    """Raise `CaseTimeout` in the block once ``limit_s`` seconds are over.

    The alarm is heard between two instructions of Python: a block that is inside native code runs on until it comes back.
    Without a limit, outside the main thread and where the system has no alarms nothing happens.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if limit_s is None or not usable:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise CaseTimeout(_is_importing(frame))

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_importing(frame: FrameType | None) -> bool:
    # asked here: tracebacks leave out the frames of imports
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def is_overdue(entry: Mapping[str, Any], limit_s: float) -> bool:
    """Whether the case of a box's entry neither ended nor stopped in its grace."""
    return time.monotonic() - float(entry["began"]) > limit_s + GRACE_S


def stopped(limit_s: float) -> str:
    """Reason of a case that heard its alarm."""
    return f"timeout: it ran longer than --kv-timeout={limit_s:g} s and was stopped"


def killed(limit_s: float) -> str:
    """Reason of a case that did not."""
    return (
        f"timeout: it ran longer than --kv-timeout={limit_s:g} s, did not stop within {GRACE_S:g} s more, and its process was "
        "killed"
    )
