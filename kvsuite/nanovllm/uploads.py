"""Numbers of the host on their way to the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .block_table import Ints


def staging(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the host to be filled and sent. Pinned for CUDA, so that nobody waits; the allocator watches its copy."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def upload(device: torch.device, *numbers: Ints) -> list[Tensor]:
    """Numbers on the device, in one transfer, which the host does not wait for."""
    if device.type != "cuda":
        return [torch.from_numpy(each) for each in numbers]
    sizes = [each.size for each in numbers]
    packed = staging(device, (sum(sizes),), torch.int64)
    np.concatenate([each.ravel() for each in numbers], out=packed.numpy())
    parts = torch.split(packed.to(device, non_blocking=True), sizes)
    return [part.view(each.shape) for part, each in zip(parts, numbers, strict=True)]
