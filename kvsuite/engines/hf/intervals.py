"""Time inside marked intervals of a pass: what compression takes of it."""

from __future__ import annotations

from kvsuite.meters.clock import Clock


class IntervalClock:
    """Adds up the intervals between pairs of calls, ``(True)`` at a begin and ``(False)`` at an end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks = 0
        clock.start()

    def __call__(self, begin: bool) -> None:
        if begin != (self._marks % 2 == 0):
            raise RuntimeError("intervals must not nest")
        self._marks += 1
        self._clock.mark()

    def total(self) -> float:
        """Seconds inside intervals."""
        if not self._marks:
            return 0.0
        stamps = self._clock.seconds()
        return sum(end - begin for begin, end in zip(stamps[::2], stamps[1::2], strict=True))
