"""What tests start: processes that signals reach wherever the tests run, and that end with the block that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import Any

#: ``PYTEST_ADDOPTS`` of a pytest that a test starts: plugins that load much and have nothing to do there
FEWER_PLUGINS = "-p no:hypothesispytest -p no:anyio"
_NUMBERS = [getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM") if hasattr(signal, name)]


def hand_on_default_signals() -> None:
    """Give children the default handlers, also where our own parent (``nohup``, a script's ``&``) made us ignore signals.

    What a process ignores is ignored by all that it starts; what it handles is not. So it is handled here, by doing nothing,
    and this process goes on as its parent wants.
    """
    for number in _NUMBERS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def end_group(leader: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, and all of the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


@contextlib.contextmanager
def child_process(command: Sequence[str], *, limit_s: float = 120, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process; with all it started it is killed after ``limit_s``, and when the block is left.

    So nothing that is read from it or waited for can hang. ``options`` are those of `subprocess.Popen`.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        limit = threading.Timer(limit_s, end_group, [process])
        limit.start()
        try:
            yield process
        finally:
            limit.cancel()
            end_group(process)
