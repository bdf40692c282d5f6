"""How long pieces of work take where they are done: events of a CUDA stream, or the host's clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class Spans:
    """Pieces of work under way, in the order in which they were begun, and what becomes of their times.

    Parameters
    ----------
    device
        Where the work is done. On CUDA a span lies between two events of the stream that is current, elsewhere between
        two readings of ``now``.
    now
        Seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._on_cuda = device.type == "cuda"
        self._now = now
        self._under_way: deque[tuple[Any, Any, Callable[[float], None]]] = deque()

    @property
    def under_way(self) -> int:
        """Pieces that are not known to be over."""
        return len(self._under_way)

    def mark(self) -> Any:
        """A point of the work that was given to the current stream."""
        if not self._on_cuda:
            return self._now()
        event: Any = torch.cuda.Event
        made = event(enable_timing=True)
        made.record()
        return made

    def add(self, start: Any, end: Any, then: Callable[[float], None]) -> None:
        """Tell ``then`` the seconds between two marks, once the later one is passed (`collect`)."""
        self._under_way.append((start, end, then))

    def collect(self) -> None:
        """Tell the times of all that is over; never waits."""
        # another thread may add one meanwhile
        for _ in range(len(self._under_way)):
            start, end, then = self._under_way.popleft()
            if not self._on_cuda:
                then(end - start)
            elif end.query():
                then(start.elapsed_time(end) / 1000)
            else:
                self._under_way.append((start, end, then))

    def finish(self) -> None:
        """Wait until all is over, and tell the times."""
        while self._under_way:
            start, end, then = self._under_way.popleft()
            if self._on_cuda:
                end.synchronize()
            then((start.elapsed_time(end) / 1000) if self._on_cuda else end - start)
