"""The partitions that a controller can come to, opened before anything runs: it moves by one step at a time."""

from __future__ import annotations

from typing import Any

import torch

from kvsuite.sm_split import PartitionRequest, SmSplit, split

from .controller import main_ratio, ratios
from .green_contexts import SmPartition, open_split, sm_facts


def splits(total: int, capability: tuple[int, int]) -> dict[float, SmSplit]:
    """Counts of SMs by the prompt lane's share.

    Raises
    ------
    CaseInvalid
        If the device cannot be parted by one of them.
    CaseSkipped
        If the multiples of its compute capability are not known.
    """
    found = {}
    for ratio in ratios():
        request = PartitionRequest(decode=main_ratio(ratio), prompt=ratio)
        found[ratio] = split(request, total=total, capability=capability)
    return found


class PartitionLadder:
    """A partition for every share, those with the same counts once. Close it once the runtime is closed.

    Parameters
    ----------
    device
        A CUDA device.

    Raises
    ------
    CaseInvalid
        If the device cannot be parted by one of the shares.
    CaseSkipped
        If there is no CUDA device, or nobody here can part it.
    """

    def __init__(self, device: torch.device) -> None:
        self.by_ratio: dict[float, SmPartition] = {}
        made: dict[tuple[int, int], SmPartition] = {}
        try:
            for ratio, wanted in splits(*sm_facts(device)).items():
                counts = (wanted.decode_sms, wanted.prompt_sms)
                if counts not in made:
                    made[counts] = open_split(wanted, device)
                self.by_ratio[ratio] = made[counts]
        except BaseException:
            self.close()
            raise

    def to_dict(self) -> dict[str, Any]:
        """What a record says as realised: a partition for every share, JSON types."""
        parts = {f"{ratio:g}": partition.to_dict() for ratio, partition in self.by_ratio.items()}
        return {"provider": next(iter(parts.values()))["provider"], "by_share": parts}

    def close(self) -> None:
        """Give all of them back."""
        for partition in self.by_ratio.values():
            partition.close()
