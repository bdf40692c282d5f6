"""Many runs of pytest for the price of one: a process loads torch once, and every run is a fork of it with its own folder."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from child_processes import end_group

_LIMIT_S = 600
_SERVER = Path(__file__).with_name("fork_server.py")


@dataclass
class ForkedRun:
    """A run that is under way."""

    pid: int
    _server: subprocess.Popen[bytes]
    _code: int | None = None

    def is_over(self) -> bool:
        """Whether it has an exit code."""
        return self._code is not None or bool(select.select([self._server.stdout], [], [], 0)[0])

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        if self._code is None:
            self._code = _answer(self._server)
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it is over."""
        if not self.is_over():
            # between its end and its exit code nobody has its process id
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def workers(self) -> list[psutil.Process]:
        """Its workers of xdist: each is a fork of the process that waits for it, and that one of the process that forks all."""
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(self._server.pid)
            [forking] = [process for process in server.children() if process.pid != self.pid]
            return [worker for waiting in forking.children() for worker in waiting.children()]
        return []


@contextlib.contextmanager
def run_forked(
    folder: Path, command: list[str], environment: dict[str, str], out: Path, err: Path
) -> Iterator[ForkedRun]:
    """Run ``pytest`` or a module with its arguments in ``folder``, with this environment and streams into files.

    It is killed when the block is left.
    """
    if _server().poll() is not None:
        # killed with a run over the limit
        _server.cache_clear()
    server = _server()
    assert server.stdin is not None
    server.stdin.write(json.dumps([str(folder), command, environment, str(out), str(err)]).encode() + b"\n")
    limit = threading.Timer(_LIMIT_S, end_group, [server])
    limit.start()
    try:
        run = ForkedRun(_answer(server), server)
        try:
            yield run
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait()
    finally:
        limit.cancel()


def _answer(server: subprocess.Popen[bytes]) -> int:
    assert server.stdout is not None
    if not (answer := server.stdout.readline()):
        server.wait()
        raise AssertionError(f"no answer within {_LIMIT_S} s: the process that forks is dead")
    return int(answer)


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    from pytest_runs import clean_environment

    place = tempfile.mkdtemp(prefix="kvsuite-forks-")
    # without buffers, so that `select` sees an answer, and what a run prints can be read at once
    server = subprocess.Popen(
        [sys.executable, "-u", "-W", "ignore", str(_SERVER), place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        env=clean_environment(), start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        # no run is under way, or this process was told to end
        end_group(server)
        server.communicate()
        shutil.rmtree(place)

    atexit.register(end)
    return server
