"""Progress of a run: which case, which phase, how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .time_left import TimeLeft

Write = Callable[[str], None]


class Progress:
    """Prints one line when a case ends, and one every ``every_s`` seconds inside a long phase.

    Parameters
    ----------
    write
        Takes one line without a line end.
    total
        Number of cases.
    left
        What is expected of them; without it the rest takes as long as what has ended.
    every_s
        Least seconds between two lines inside a phase.
    now
        Clock in seconds.
    """

    def __init__(
        self,
        write: Write,
        total: int,
        left: TimeLeft | None = None,
        *,
        every_s: float = 10.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._total = total
        self._left = left
        self._every = every_s
        self._now = now
        self._begin = now()
        self._last = self._begin
        self._event = self._begin
        self._phase = ("", self._begin)
        self._done = 0
        self._name = ""

    def case(self, name: str) -> None:
        """A case begins."""
        self._name = name

    def phase(self, phase: str, done: int, of: int, note: str = "") -> None:
        """Inside the running case ``done`` of ``of`` steps of ``phase`` are over; ``note`` is a result so far."""
        now, begun = self._now(), self._event
        self._event = now
        if phase != self._phase[0]:
            # the phase began when the last event before it was over
            self._phase = (phase, begun)
        if now - self._last < self._every or done >= of:
            return
        self._last = now
        left = (now - self._phase[1]) / max(done, 1) * (of - done)
        self._write(
            f"  [{self._done + 1}/{self._total}] {self._name}: {phase} {done}/{of}{note}, {about(left)} left in this phase"
        )

    def finished(self, summary: str, row: Mapping[str, Any] | None = None) -> None:
        """The running case ended; ``row`` is its record, for what is left."""
        now = self._now()
        self._last = self._event = now
        self._phase = ("", now)
        self._done += 1
        elapsed = now - self._begin
        if self._left is not None and row is not None:
            self._left.finished(row)
            left = self._left.seconds
        else:
            left = elapsed / self._done * (self._total - self._done)
        rest = "time left unknown" if left is None else f"{about(left)} left"
        self._write(
            f"  [{self._done}/{self._total}] {self._name}: {summary} · {duration(elapsed)} elapsed, "
            f"{rest if self._done < self._total else 'done'}"
        )


def duration(seconds: float) -> str:
    """``75.4`` becomes ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def about(seconds: float) -> str:
    """An estimate in words that no one takes for a clock: ``about 40 s``, ``about 3 min``, ``about 2 h 10 min``."""
    if seconds < 90:
        # an estimate has no single seconds
        return f"about {max(round(seconds / 10) * 10, 10)} s" if seconds >= 5 else "about 5 s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    hours, minutes = divmod(round(minutes / 10) * 10, 60)
    return f"about {hours} h {minutes} min" if minutes else f"about {hours} h"
