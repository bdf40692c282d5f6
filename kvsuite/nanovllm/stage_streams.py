"""Where the compression stage works: on the stream of the steps, or beside it, with events in both directions."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .fences import Fence
from .side_streams import side_stream

Work = Callable[[], None]


class Aside(Protocol):
    """A place beside the stream of the steps. What is submitted runs in order, behind all that the steps were given before."""

    def fence(self) -> Fence:
        """A fence of the work that is submitted next; until then it has not passed."""

    def submit(self, work: Work, fence: Fence) -> None:
        """Give it work; the fence passes when it is over."""

    def follow(self, fence: Fence) -> None:
        """Let what the steps are given from now on come behind a fence; the host does not wait."""

    def join(self) -> None:
        """Let what the steps are given from now on come behind all that was submitted; the host does not wait."""


class _EventFence:
    """The end of one piece of work on a stream."""

    def __init__(self) -> None:
        event: Any = torch.cuda.Event
        self.event = event()
        self.recorded = False

    def passed(self) -> bool:
        """Whether the work was submitted and is over."""
        return self.recorded and bool(self.event.query())

    def wait(self) -> None:
        """Return when the work is over."""
        self.event.synchronize()


class SideStream:
    """A CUDA stream of its own: that of all runtimes' compression.

    Parameters
    ----------
    device
        The CUDA device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = side_stream("compressing", device)
        # what work reads was made on the stream of the steps, whose allocator would hand it out again
        self._alive: deque[tuple[_EventFence, Work]] = deque()

    def fence(self) -> _EventFence:
        """A fence of the work that is submitted next."""
        return _EventFence()

    def submit(self, work: Work, fence: Fence) -> None:
        """Launch work behind what the current stream was given so far."""
        assert isinstance(fence, _EventFence)
        while self._alive and self._alive[0][0].passed():
            self._alive.popleft()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self._alive.append((fence, work))
        try:
            with torch.cuda.stream(self.stream):
                work()
        finally:
            fence.event.record(self.stream)
            fence.recorded = True

    def follow(self, fence: Fence) -> None:
        """Let the current stream wait for a fence."""
        assert isinstance(fence, _EventFence)
        torch.cuda.current_stream(self.stream.device).wait_event(fence.event)

    def join(self) -> None:
        """Let the current stream wait for all work."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class _DoneFence:
    """The end of work that is over when it was given."""

    def __init__(self) -> None:
        self.done = False

    def passed(self) -> bool:
        """Whether the work was submitted."""
        return self.done

    def wait(self) -> None:
        """The work is over."""


class AtOnce:
    """The same order of books where work is over when it was given, as on a CPU."""

    def fence(self) -> _DoneFence:
        """A fence of the work that is submitted next."""
        return _DoneFence()

    def submit(self, work: Work, fence: Fence) -> None:
        """Do the work."""
        assert isinstance(fence, _DoneFence)
        try:
            work()
        finally:
            fence.done = True

    def follow(self, fence: Fence) -> None:
        """Nothing is left to wait for."""

    def join(self) -> None:
        """Nothing is left to wait for."""


def aside_of(device: torch.device) -> Aside:
    """A place beside the steps of a device."""
    return SideStream(device) if device.type == "cuda" else AtOnce()
