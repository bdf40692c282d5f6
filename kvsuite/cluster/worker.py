"""A worker: owns one process that measures, on its host. What Ray makes an actor of; knows nothing of Ray itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from kvsuite.measure.deadline import is_overdue, killed
from kvsuite.options.sweep import SweepOptions
from kvsuite.survival.death import Cause, cause_of, crashed_row

from .orders import BEGIN_S, CaseAnswer, Order, Ready, Setup

_POLL_S = 0.2


class Worker:
    """Measures one case at a time.

    Parameters
    ----------
    setup
        Of the run.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._limit = setup.options.of(SweepOptions).timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection | None = None
        self._environment: dict[str, Any] = {}
        #: what the black box of the running case says; empty before it has one
        self._box: dict[str, Any] = {}

    def begin(self) -> Ready:
        """Start the process, and tell what it found around it.

        Raises
        ------
        RuntimeError
            If it ends instead.
        """
        found = self._start()
        self._environment = found.environment
        return found

    def alive(self) -> None:
        """Nothing: who answers was alive when it was asked."""

    def measure(self, order: Order) -> CaseAnswer:
        """Measure a case; the death of the process that does is its row."""
        self._box = {}
        try:
            try:
                answer = self._asked(order)
            except (EOFError, OSError):
                if self._box:
                    raise
                # it has not begun: the process has died before, while it had nothing to do
                self.close()
                answer = self._asked(order)
        except (EOFError, OSError):
            return self._crashed(order, self._ended())
        except RuntimeError as error:
            return self._crashed(order, Cause("not started", str(error)))
        if answer is None:
            assert self._limit is not None
            self.close()
            return self._crashed(order, Cause("Timeout", killed(self._limit)))
        if answer.is_spent:
            self.close()
        return answer

    def close(self) -> None:
        """End the process that measures."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None

    def _start(self) -> Ready:
        """Start the process; raises RuntimeError if it ends or hangs instead."""
        self._channel, theirs = Pipe()
        # of this process, to which a cluster may have given code
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        with theirs:
            command = [sys.executable, "-m", "kvsuite.cluster.measuring_process", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()]
            )
        try:
            self._channel.send(self._setup)
            found: Ready | str = f"it has said nothing for {BEGIN_S:g} s"
            if self._channel.poll(BEGIN_S):
                found = self._channel.recv()
        except (EOFError, OSError):
            found = self._ended().reason
        if isinstance(found, Ready):
            return found
        self.close()
        raise RuntimeError(f"the process that measures did not start: {found}")

    def _asked(self, order: Order) -> CaseAnswer | None:
        if self._channel is None:
            self._start()
        assert self._channel is not None
        self._channel.send(order)
        return self._received(self._channel)

    def _received(self, channel: Connection) -> CaseAnswer | None:
        """The answer, ``None`` where the case has taken too long."""
        while True:
            while not channel.poll(_POLL_S):
                if self._limit is not None and self._box and is_overdue(self._box, self._limit):
                    return None
            news: dict[str, Any] | CaseAnswer = channel.recv()
            if isinstance(news, CaseAnswer):
                return news
            self._box = news

    def _crashed(self, order: Order, cause: Cause) -> CaseAnswer:
        row = order.record(self._setup.options, self._environment)
        unbegun = {"row": row, "phase": "setup", "began": time.monotonic()}
        return CaseAnswer(crashed_row(self._box or unbegun, cause), None, self._environment)

    def _ended(self) -> Cause:
        """Cause of death of a process that has closed its connection."""
        assert self._process is not None
        code = self._process.wait()
        self.close()
        return cause_of(code)
