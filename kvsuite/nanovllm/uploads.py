"""Numbers of the host on their way to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .block_table import Ints


def upload(device: torch.device, *numbers: Ints) -> list[Tensor]:
    """Numbers on the device, in one transfer. From pinned memory, which the host need not wait for."""
    if device.type != "cuda":
        return [torch.from_numpy(each) for each in numbers]
    packed = torch.from_numpy(np.concatenate([each.ravel() for each in numbers])).pin_memory()
    parts = torch.split(packed.to(device, non_blocking=True), [each.size for each in numbers])
    return [part.view(each.shape) for part, each in zip(parts, numbers, strict=True)]
