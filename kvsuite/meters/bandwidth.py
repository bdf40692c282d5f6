"""Measured copy bandwidth: what the floor of a decode step is divided by."""

from __future__ import annotations

from typing import Any

from .clock import clock_for


def copy_bandwidth(device: Any, *, size_bytes: int | None = None, repeats: int = 7) -> float:
    """Bytes read plus bytes written a second by a large copy on ``device``: the best of ``repeats``.

    The buffer is far larger than the caches (256 MiB on a CPU, 2 GiB on a GPU) and holds random bytes.
    """
    import torch

    size = size_bytes or (2**31 if device.type == "cuda" else 2**28)
    # eight bytes at a draw
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    clock = clock_for(device)
    target.copy_(source)
    best = float("inf")
    for _ in range(repeats):
        clock.start()
        target.copy_(source)
        clock.mark()
        best = min(best, clock.seconds()[0])
    return 2 * source.nbytes / best
