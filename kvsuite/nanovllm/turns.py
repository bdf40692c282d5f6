"""Launches of a long step in turns: a thread that gives way every few layers, so that the host can launch something else.

Two threads of Python share one interpreter lock, and one that only launches kernels holds it nearly all the time. So they
take turns: exactly one of both runs, and which one is decided by `Turns.turn` alone. The same calls give the same order of
launches on any machine. Without turns the thread runs as the interpreter lets it: to measure what that costs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batch import StepBatch
    from .paged_attention import AttentionBackend


class Turns:
    """A thread that does one piece of work at a time.

    Parameters
    ----------
    layers
        Layers of a turn; ``None``: it is not held up, and works beside its starter.
    device
        Where it launches.
    """

    def __init__(self, layers: int | None, device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._over = threading.Event()
        self._over.set()
        self._error: BaseException | None = None
        self._seen = 0
        self._thread = threading.Thread(target=self._serve, name="kvsuite-prompt-lane", daemon=True)
        self._thread.start()

    @property
    def in_turns(self) -> bool:
        """Whether the thread runs only inside `turn`."""
        return self._layers is not None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do."""
        return self._over.is_set()

    def start(self, work: Callable[[], None]) -> None:
        """Begin a piece of work; the one before is over."""
        assert self._over.is_set()
        self._over.clear()
        self._error, self._seen = None, 0
        self._work.put(work)

    def turn(self) -> bool:
        """Let it go on for some layers; return whether it is over. Never waits for a thread that is not held up."""
        if self.in_turns and not self._over.is_set():
            self._go.release()
            self._stopped.acquire()
        return self._over.is_set()

    def finish(self) -> None:
        """Let it go on to its end."""
        while self.in_turns and not self.turn():
            pass
        self._over.wait()

    def error(self) -> BaseException | None:
        """What the last piece of work raised."""
        return self._error

    def around(self, backend: AttentionBackend) -> AttentionBackend:
        """An attention whose layers make turns."""
        return _Paused(self, backend) if self.in_turns else backend

    def close(self) -> None:
        """End the thread, with what it has begun."""
        self.finish()
        self._work.put(None)
        self._thread.join()

    def layer_done(self) -> None:
        """One more layer is launched; called by the thread itself."""
        self._seen += 1
        if self._layers is not None and self._seen % self._layers == 0:
            self._stopped.release()
            self._go.acquire()

    def _serve(self) -> None:
        if self._device.index is not None:
            torch.cuda.set_device(self._device)
        while (work := self._work.get()) is not None:
            if self.in_turns:
                self._go.acquire()
            try:
                work()
            except BaseException as error:  # raised again by whoever asked for the work
                self._error = error
            self._over.set()
            if self.in_turns:
                self._stopped.release()


class _Paused:
    """An attention that ends a turn behind some of its layers."""

    def __init__(self, turns: Turns, backend: AttentionBackend) -> None:
        self._turns, self._backend = turns, backend

    def begin(self, batch: StepBatch) -> None:
        self._backend.begin(batch)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._backend.write(layer, key, value)

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        found = self._backend.attend(layer, query, scale, out)
        self._turns.layer_done()
        return found

    def __getattr__(self, name: str) -> Any:
        # where the attention stores keys itself it has a `destination`
        return getattr(self._backend, name)
