"""Streams beside the current one of a CUDA device: one for each purpose, made once."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

Purpose = Literal["captures", "compressing", "prompts", "single tokens", "unbound decoding"]


def side_stream(purpose: Purpose, device: torch.device | int) -> Any:
    """The stream of a CUDA device for a purpose, the same one for every runtime.

    torch hands out 32 streams in turn, and the 33rd is the first again. Were one made for every runtime, compression or
    prompts would come to the stream of the captures, and share cuBLAS' workspace with captured steps that are replayed on
    another stream at the same time. Besides, cuBLAS keeps a workspace of 32 MiB for every stream that it ever saw on Hopper.
    """
    index = device if isinstance(device, int) else device.index
    return _made(purpose, torch.cuda.current_device() if index is None else index)


@functools.cache
def _made(purpose: Purpose, index: int) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(index)
