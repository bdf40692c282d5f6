"""Numbers of the host on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_table import Ints


def upload(device: torch.device, *numbers: Ints) -> list[Tensor]:
    """Numbers on the device, in one transfer. From pinned memory, which the host need not wait for."""
    if device.type != "cuda":
        return [torch.from_numpy(each) for each in numbers]
    sizes = [each.size for each in numbers]
    packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    np.concatenate([each.ravel() for each in numbers], out=packed.numpy())
    parts = torch.split(packed.to(device, non_blocking=True), sizes)
    return [part.view(each.shape) for part, each in zip(parts, numbers, strict=True)]


class StepTable:
    """A table of int32 that is filled and sent behind every step, always through the same memory.

    The host fills two buffers in turn. By the time that one comes again its copy is mostly over; where it is not, another one
    takes its place, so that the host never waits.

    Parameters
    ----------
    device
        Where it goes.
    numbers
        Most numbers that it has.
    """

    def __init__(self, device: torch.device, numbers: int) -> None:
        self._on_cuda = device.type == "cuda"
        self._numbers = numbers
        self._hosts = [self._host() for _ in range(2)]
        self._sent = torch.empty(numbers, dtype=torch.int32, device=device) if self._on_cuda else None
        event: Any = torch.cuda.Event
        self._copied: list[Any] = [event() for _ in range(2)] if self._on_cuda else []
        self._turn = 0
        # the buffers in the shape of the table, by turn: for the host, to be copied, on the device
        self._shape: tuple[int, ...] = ()
        self._views: dict[int, tuple[NDArray[np.int32], Tensor, Tensor]] = {}

    def table(self, *shape: int) -> NDArray[np.int32]:
        """The table to be filled."""
        turn = self._turn = 1 - self._turn
        if self._on_cuda and not self._copied[turn].query():
            self._hosts[turn] = self._host()
            self._views.pop(turn, None)
        if shape != self._shape:
            self._shape = shape
            self._views.clear()
        if turn not in self._views:
            count = int(np.prod(shape))
            host = self._hosts[turn][:count].view(shape)
            self._views[turn] = host.numpy(), host, host if self._sent is None else self._sent[:count].view(shape)
        return self._views[turn][0]

    def send(self) -> Tensor:
        """The table that was filled last on the device; it holds until the next one is sent."""
        _, host, sent = self._views[self._turn]
        if self._on_cuda:
            sent.copy_(host, non_blocking=True)
            self._copied[self._turn].record()
        return sent

    def _host(self) -> Tensor:
        return torch.zeros(self._numbers, dtype=torch.int32, pin_memory=self._on_cuda)
