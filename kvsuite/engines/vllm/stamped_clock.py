"""The clock of times that another process took."""

from __future__ import annotations

from typing import ClassVar

from kvsuite.meters.clock import Clock


class StepClock(Clock):
    """Host clock of the process that steps an engine, read when a step has given its tokens.

    It is read there: what is asked of this one is its name.
    """

    name: ClassVar[str] = "engine_step"

    def start(self) -> None:
        raise RuntimeError("times of engine vllm are taken in its own process")

    def mark(self) -> None:
        raise RuntimeError("times of engine vllm are taken in its own process")

    def seconds(self) -> list[float]:
        raise RuntimeError("times of engine vllm are taken in its own process")
