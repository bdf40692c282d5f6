"""Streams beside the current one of a CUDA device, one for each purpose, made once; and what the current one may use."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch

from . import cuda_driver

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


def processors(device: torch.device) -> int:
    """SMs that the current stream may use: all of the device, or those of its green context (not while it is captured)."""
    every = int(torch.cuda.get_device_properties(device).multi_processor_count)
    stream = torch.cuda.current_stream(device)
    # a capture ends at the first call that it does not allow
    if stream == torch.cuda.default_stream(device) or torch.cuda.is_current_stream_capturing():
        return every
    try:
        own = cuda_driver.sms_of(stream.cuda_stream)
    except cuda_driver.DriverError:
        # a driver that knows no green contexts has none
        return every
    return every if own is None else own
