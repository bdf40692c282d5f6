"""A stage whose work waits until a test lets it be done: what a delayed event is on a device."""

from __future__ import annotations

from collections import deque

from hand_fence import HandFence

from kvsuite.nanovllm.stage_streams import Work


class WorkFence(HandFence):
    """Passed when its work is done; who waits for it has all work up to it done."""

    def __init__(self, aside: HandAside) -> None:
        super().__init__()
        self._aside = aside

    def wait(self) -> None:
        self.waits += 1
        self._aside.do_until(self)


class HandAside:
    """Work in the order in which it came, done when a step follows it, when somebody waits for it, or by `do_all`.

    Parameters
    ----------
    follows
        Whether steps wait for what they read; without, as where the event is forgotten.
    """

    def __init__(self, *, follows: bool = True) -> None:
        self.queue: deque[tuple[Work, WorkFence]] = deque()
        self.fences: list[WorkFence] = []
        self._follows = follows

    def fence(self) -> WorkFence:
        self.fences.append(WorkFence(self))
        return self.fences[-1]

    def submit(self, work: Work, fence: WorkFence) -> None:
        self.queue.append((work, fence))

    def follow(self, fence: WorkFence) -> None:
        if self._follows:
            self.do_until(fence)

    def join(self) -> None:
        self.do_all()

    def do_until(self, fence: WorkFence) -> None:
        while not fence.over:
            work, own = self.queue.popleft()
            work()
            own.let_pass()

    def do_all(self) -> None:
        if self.queue:
            self.do_until(self.queue[-1][1])

    @property
    def waits(self) -> int:
        """How often somebody waited on the host."""
        return sum(fence.waits for fence in self.fences)
