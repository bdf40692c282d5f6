"""A fence that a test passes by hand, in the place of a device's event."""

from __future__ import annotations


class HandFence:
    """Not passed until `let_pass`; who waits for it lets it pass, and is counted."""

    def __init__(self) -> None:
        self.over = False
        self.waits = 0

    def passed(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.waits += 1
        self.let_pass()

    def let_pass(self) -> None:
        self.over = True
