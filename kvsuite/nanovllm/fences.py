"""When work on a stream is over, as the host learns it: blocks that such work reads or writes are not given away before."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Fence(Protocol):
    """A point in the work of a stream."""

    def passed(self) -> bool:
        """Whether all work before the point is over; never waits."""

    def wait(self) -> None:
        """Return when all work before the point is over."""


class StreamFence:
    """The end of what a CUDA stream was given so far.

    Parameters
    ----------
    stream
        The stream; the current one if left out.
    """

    def __init__(self, stream: Any = None) -> None:
        event: Any = torch.cuda.Event
        self._event = event()
        self._event.record(torch.cuda.current_stream() if stream is None else stream)

    def passed(self) -> bool:
        """Whether all work before the point is over."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Return when all work before the point is over."""
        self._event.synchronize()


def fence_now(device: torch.device, stream: Any = None) -> Fence | None:
    """A fence behind what the stream was given so far; ``None`` on a CPU, where work is over when it was given."""
    return StreamFence(stream) if device.type == "cuda" else None
