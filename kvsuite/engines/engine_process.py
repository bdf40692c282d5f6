"""Processes of engines: in a group of their own, with a deadline, killed with all they started, their output kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

#: of our environment, and of nobody's whom we start
SECRETS = frozenset({"KV_SERVER_KEY"})
_GUARD = Path(__file__).with_name("process_guard.py")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_OUT_OF_MEMORY = re.compile(
    r"Insufficient GPU memory|std::bad_alloc|out of memory|OUT_OF_(DEVICE|HOST)_MEMORY|Cannot allocate memory", re.I
)
_TAIL_LINES = 15
# a native backtrace without symbols: twenty such lines push the cause out of a message
_FRAME = re.compile(r'\s*File "<unknown>", line \d+, in ')
_TAIL_CHARACTERS = 2000
_POLL_S = 0.05
_QUIET_S = 0.5
_QUIET_AT_MOST_S = 10.0
# a driver lists a process no longer than so after its end
_LISTED_S = 30.0


def engine_pids() -> set[int]:
    """Ids of all processes that engines have started here, those that were ended just now included.

    A case ends its engine's processes, and a driver lists them for a moment longer.
    """
    since = time.monotonic() - _LISTED_S
    # an id is given again to a stranger some day
    ended = {pid for pid, at in _ended.items() if at > since}
    return ended.union(*(process.group() for process in list(_running)))


class EngineFailed(RuntimeError):
    """An engine's process ended, hung or answered what cannot be; the message ends with the last lines that it printed."""


class EngineProcess:
    """A running command, and all it starts.

    Parameters
    ----------
    command
        Program and arguments.
    log
        File that takes its standard output and error: engines write what matters to descriptor 2 from C++.
    environment
        Variables beside those of this process.
    without
        Variables of this process that it does not get.
    channel
        Descriptor that the command inherits under the same number, beside standard input and output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        without: Collection[str] = (),
        channel: int | None = None,
    ) -> None:
        self.command, self.log = list(command), log
        self._read: tuple[int, str] = 0, ""
        with log.open("ab") as stream:
            # a session of its own: Ctrl-C in the terminal is for us, and we end what we started
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), "" if channel is None else str(channel), *self.command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                env={name: value for name, value in os.environ.items() if name not in {*SECRETS, *without}}
                | dict(environment or {}),
                start_new_session=True,
                pass_fds=() if channel is None else (channel,),
            )
        _running.add(self)

    @property
    def pid(self) -> int:
        """Of the guard, which is also the process group."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, ``None`` while it runs."""
        return self._process.poll()

    def text(self) -> str:
        """All it has printed, without colours."""
        size = self.log.stat().st_size
        # asked many times a second while requests are timed
        if size != self._read[0]:
            self._read = size, _COLOURS.sub("", self.log.read_text(encoding="utf-8", errors="replace"))
        return self._read[1]

    def wait(self, deadline_s: float) -> int | None:
        """Exit code, ``None`` if the deadline came first."""
        ends = time.monotonic() + deadline_s
        while self.exit_code is None and time.monotonic() < ends:
            time.sleep(_POLL_S)
        return self.exit_code

    def wait_until_quiet(self) -> None:
        """Wait until it prints no more: a message is of use when its last line is there."""
        ends, before = time.monotonic() + _QUIET_AT_MOST_S, ""
        while before != (before := self.text()) and time.monotonic() < ends:
            time.sleep(_QUIET_S)

    def group(self) -> set[int]:
        """Ids of the guard and of all that it has started; empty where it has ended."""
        # the id of one that ended may be another's by now
        if self.exit_code is None:
            with suppress(psutil.NoSuchProcess):
                return {self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))}
        return set()

    def kill(self) -> None:
        """End it and everything it has started."""
        _ended.update(dict.fromkeys(self.group(), time.monotonic()))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        _running.discard(self)
        if self._process.stdin is not None:
            self._process.stdin.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


_running: set[EngineProcess] = set()
#: when each was ended
_ended: dict[int, float] = {}


def run_step(
    what: str,
    command: Sequence[str],
    *,
    log: Path,
    deadline_s: float,
    environment: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> str:
    """Run a command to its end.

    Parameters
    ----------
    what
        For messages: ``the command``.
    command, log, environment, without
        Of `EngineProcess`.
    deadline_s
        Seconds after which it is killed.

    Returns
    -------
    str
        What it printed.

    Raises
    ------
    EngineFailed, MemoryError
        If it fails or is too slow, with the end of what it printed.
    """
    with EngineProcess(command, log=log, environment=environment, without=without) as process:
        code = process.wait(deadline_s)
        printed = process.text()
    if code is None:
        raise failure(f"{what} was killed after {deadline_s:g} s without an end", printed)
    if code:
        raise failure(f"{what} failed with exit code {code}", printed)
    return printed


def failure(message: str, printed: str) -> Exception:
    """The error of a process that failed: `MemoryError` where it ran out of memory, else `EngineFailed`."""
    kind = MemoryError if _OUT_OF_MEMORY.search(printed) else EngineFailed
    return kind(f"{message}; the last it printed:\n{tail(printed)}")


def tail(printed: str) -> str:
    """The last lines of an output, as many as a message can take, without the frames of a native backtrace."""
    lines = [line for line in printed.splitlines() if line.strip() and not _FRAME.match(line)]
    return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:] or "(nothing)"
