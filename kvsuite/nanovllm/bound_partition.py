"""The partition that both lanes run on, where a controller moves them between several."""

from __future__ import annotations

from collections.abc import Mapping

from .green_contexts import SmPartition
from .prompt_lane import LaneStreams
from .runner import Runner


class BoundPartition:
    """Moves the lanes of a runtime between partitions.

    Parameters
    ----------
    partitions
        By the share of the prompt lane.
    streams
        Of the lanes; ``None`` with one lane, which has no partitions.
    runner
        Of decode steps, which are captured on every partition.
    """

    def __init__(self, partitions: Mapping[float, SmPartition], streams: LaneStreams | None, runner: Runner) -> None:
        self._partitions = dict(partitions)
        self._streams = streams
        self._runner = runner
        self._bound: SmPartition | None = None

    def prepare(self) -> None:
        """Capture decode steps on every partition: later it would be done while requests wait."""
        for ratio in self._partitions:
            self.bind(ratio)
        self.bind(None)

    def bind(self, ratio: float | None) -> dict[str, int] | None:
        """Move the lanes to the partition of a share, between two steps of either; return its SMs."""
        partition = None if ratio is None else self._partitions[ratio]
        if partition is not self._bound:
            assert self._streams is not None
            self._streams.bind(partition)
            self._bound = partition
            with self._streams.decode():
                self._runner.use_captured("" if partition is None else partition.id)
        return None if partition is None else {"decode_sms": partition.decode_sms, "prompt_sms": partition.prompt_sms}
