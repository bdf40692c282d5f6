"""Two streams that own a part of a GPU's SMs each: CUDA green contexts, from whatever provides them here.

Providers are tried in turn: ``torch.cuda.green_contexts``, ``sgl_kernel``, ``flashinfer.green_ctx``, the CUDA driver itself.
What a provider gave is asked of the driver, stream by stream; one that gave other counts, or streams of the whole device, is
passed over with that reason. Where none is left the case is skipped: there is no partition that is only a label.

Not every provider can give two parts. Up to torch 2.13 each of its contexts is cut from the whole device, so that two of
them share SMs: it serves where the decode lane is not bound, and from 2.14 on, where it splits.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from kvsuite.errors import CaseInvalid, CaseSkipped
from kvsuite.sm_split import PartitionRequest, SmSplit, nearest, split

from . import cuda_driver
from .side_streams import side_stream

Stream = torch.cuda.Stream


class _PassedOver(Exception):
    """Why a provider is not taken."""


@dataclass
class _Made:
    """What a provider made: streams of decode and prompt lane, and how it is given back."""

    decode: Stream | None
    prompt: Stream
    close: Callable[[], None]
    keep: Any = None


@dataclass
class SmPartition:
    """Two lanes' streams with the SMs that they really have, made once in a process. Close it once nothing runs on them.

    Parameters
    ----------
    split
        What was asked of the provider.
    decode_stream, prompt_stream
        Streams of the lanes. An unbound decode lane has a stream of the whole device.
    decode_sms, prompt_sms
        SMs of each, as the driver says.
    provider
        Who made them.
    passed_over
        Provider to reason, for those tried before.
    """

    split: SmSplit
    decode_stream: Stream
    prompt_stream: Stream
    decode_sms: int
    prompt_sms: int
    provider: str
    passed_over: dict[str, str]
    _made: _Made = field(repr=False)

    @property
    def id(self) -> str:
        """``24_104``: what captured decode steps are kept apart by."""
        return f"{self.decode_sms}_{self.prompt_sms}"

    def to_dict(self) -> dict[str, Any]:
        """What a record says as realised: JSON types."""
        preloaded = os.environ.get("LD_PRELOAD", "")
        found: dict[str, Any] = {
            **self.split.to_dict(),
            "decode_sms": self.decode_sms,
            "prompt_sms": self.prompt_sms,
            "provider": self.provider,
            "passed_over": dict(self.passed_over),
            "shimmed": bool(preloaded),
        }
        return found | ({"ld_preload": preloaded} if preloaded else {})

    def close(self) -> None:
        """Wait for both lanes. The streams stay, for whoever opens the same split again in this process.

        Pinned memory that was used on a stream is freed at any time later, and torch then records an event on that stream.
        """
        torch.cuda.synchronize(self.prompt_stream.device)
        # tensors that a lane used hold events of its streams
        gc.collect()
        torch.cuda.empty_cache()


#: partitions that this process has made, by device and split
_MADE: dict[tuple[int, SmSplit], SmPartition] = {}


def sm_facts(device: torch.device) -> tuple[int, tuple[int, int]]:
    """SMs and compute capability of a device.

    Raises
    ------
    CaseSkipped
        If it is no CUDA device, or there is none here.
    """
    if device.type != "cuda":
        raise CaseSkipped(f"SM partition: needs a CUDA device, not {device.type}")
    if not torch.cuda.is_available():
        raise CaseSkipped("SM partition: torch sees no CUDA device")
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count), (int(properties.major), int(properties.minor))


def open_partition(request: PartitionRequest, device: torch.device) -> SmPartition:
    """Give each lane its SMs.

    Raises
    ------
    CaseInvalid
        If the device cannot be parted so; the nearest legal pairs are named.
    CaseSkipped
        If there is no CUDA device, or no provider here that can; with the reason of each.
    """
    total, capability = sm_facts(device)
    return open_split(split(request, total=total, capability=capability), device)


def open_split(wanted: SmSplit, device: torch.device) -> SmPartition:
    """As `open_partition`, for counts that are known to be legal."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, wanted) in _MADE:
        return _MADE[index, wanted]
    passed_over: dict[str, str] = {}
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()
        for provider, make in PROVIDERS.items():
            try:
                opened = _opened(provider, make(wanted, index), wanted, index, passed_over)
                _MADE[index, wanted] = opened
                return opened
            except _PassedOver as error:
                passed_over[provider] = str(error)
            except Exception as error:  # packages of others, built against other drivers
                passed_over[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    reasons = "; ".join(f"{provider}: {reason}" for provider, reason in passed_over.items())
    raise CaseSkipped(f"SM partition {wanted.decode_sms}:{wanted.prompt_sms}: nobody here can make it: {reasons}")


def _opened(provider: str, made: _Made, wanted: SmSplit, index: int, passed_over: dict[str, str]) -> SmPartition:
    """The partition, if the driver says that it is what was asked for."""
    try:
        streams = [made.prompt] if made.decode is None else [made.prompt, made.decode]
        counts = [cuda_driver.sms_of(stream.cuda_stream) for stream in streams]
        asked = [wanted.prompt_sms, wanted.decode_sms][: len(streams)]
        if counts != asked:
            given = " and ".join("all" if count is None else str(count) for count in counts[::-1])
            raise _PassedOver(f"gave {given} SMs where {' and '.join(map(str, asked[::-1]))} were asked for")
    except BaseException:
        with suppress(cuda_driver.DriverError):
            made.close()
        raise
    return SmPartition(
        split=wanted,
        decode_stream=side_stream("unbound decoding", index) if made.decode is None else made.decode,
        prompt_stream=made.prompt,
        decode_sms=wanted.decode_sms,
        prompt_sms=wanted.prompt_sms,
        provider=provider,
        passed_over=passed_over,
        _made=made,
    )


def _by_torch(wanted: SmSplit, index: int) -> _Made:
    try:
        contexts = importlib.import_module("torch.cuda.green_contexts")
    except ImportError:
        raise _PassedOver(f"torch {torch.__version__} has no green contexts") from None
    context = contexts.GreenContext
    if hasattr(getattr(contexts, "SMPartition", None), "split"):
        counts = [wanted.prompt_sms, *([wanted.decode_sms] if wanted.decode_bound else [])]
        parts, _ = contexts.SMPartition.from_device(index).split(num_sms=counts)
        made = [context(sm_partition=part) for part in parts]
        streams = [one.Stream() for one in made]
        return _Made(streams[1] if wanted.decode_bound else None, streams[0], lambda: None, keep=made)
    if wanted.decode_bound:
        raise _PassedOver(f"torch {torch.__version__} cuts each context from the whole device: two would share SMs")
    made_here = context.create(num_sms=wanted.prompt_sms, device_id=index)
    if hasattr(context, "Stream"):
        return _Made(None, made_here.Stream(), lambda: None, keep=made_here)
    made_here.set_context()
    try:
        # torch's own streams were made before, and belong to the whole device
        handle = cuda_driver.current_stream()
    finally:
        made_here.pop_context()
    return _Made(None, _external(handle, index), lambda: cuda_driver.destroy_stream(handle), keep=made_here)


def _by_sgl_kernel(wanted: SmSplit, index: int) -> _Made:
    sgl_kernel = _package("sgl_kernel")
    if not hasattr(sgl_kernel, "create_greenctx_stream_by_value"):
        raise _PassedOver("this version has no create_greenctx_stream_by_value")
    if not wanted.decode_bound:
        raise _PassedOver("it parts both lanes, and the decode lane is not bound")
    prompt, decode = sgl_kernel.create_greenctx_stream_by_value(wanted.prompt_sms, wanted.decode_sms, index)[:2]
    return _Made(decode, prompt, lambda: _destroy([prompt, decode]))


def _by_flashinfer(wanted: SmSplit, index: int) -> _Made:
    green_ctx = _package("flashinfer.green_ctx")
    if not hasattr(green_ctx, "split_device_green_ctx_by_sm_count"):
        raise _PassedOver("this version has no split_device_green_ctx_by_sm_count")
    counts = [wanted.prompt_sms, *([wanted.decode_sms] if wanted.decode_bound else [])]
    if sum(counts) == wanted.total:
        # what remains is a part of its own, and cannot be empty
        counts = counts[:-1]
    if not counts:
        raise _PassedOver("it cannot give one part all SMs")
    streams, _ = green_ctx.split_device_green_ctx_by_sm_count(torch.device("cuda", index), counts)
    return _Made(streams[1] if wanted.decode_bound else None, streams[0], lambda: _destroy(streams))


def _by_driver(wanted: SmSplit, index: int) -> _Made:
    cuda_driver.version()
    device, everything = cuda_driver.device_resource(index)
    if not wanted.decode_bound:
        group, _ = cuda_driver.take(everything, wanted.prompt_sms)
        return _from_driver(device, [group], index)
    group, _ = cuda_driver.take(everything, wanted.decode_sms + wanted.prompt_sms)
    # the parts of a split cannot be split again, those of a context can
    both = cuda_driver.green_context(device, group)
    try:
        prompt, decode = cuda_driver.take(cuda_driver.context_resource(both), wanted.prompt_sms)
        return _from_driver(device, [prompt, decode], index)
    finally:
        cuda_driver.destroy_context(both)


def _from_driver(device: int, parts: list[cuda_driver.Resource], index: int) -> _Made:
    contexts: list[int] = []
    handles: list[int] = []
    try:
        for part in parts:
            contexts.append(cuda_driver.green_context(device, part))
            handles.append(cuda_driver.context_stream(contexts[-1]))
    except BaseException:
        for handle in handles:
            cuda_driver.destroy_stream(handle)
        for context in contexts:
            cuda_driver.destroy_context(context)
        raise
    streams = [_external(handle, index) for handle in handles]
    return _Made(streams[1] if len(streams) == 2 else None, streams[0], lambda: _destroy(streams))


def _external(handle: int, index: int) -> Stream:
    external: Callable[..., Stream] = torch.cuda.ExternalStream
    return external(handle, device=index)


def _destroy(streams: list[Stream]) -> None:
    """Give streams and their green contexts back."""
    for stream in streams:
        context = cuda_driver.context_of(stream.cuda_stream)
        cuda_driver.destroy_stream(stream.cuda_stream)
        if context is not None:
            cuda_driver.destroy_context(context)


def _package(name: str) -> Any:
    top = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == top:
            raise _PassedOver("not installed") from None
        raise _PassedOver(f"cannot be imported: no {error.name}") from None
    except Exception as error:  # built for another CUDA or torch
        raise _PassedOver(f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from None


#: in the order in which they are tried
PROVIDERS: dict[str, Callable[[SmSplit, int], _Made]] = {
    "torch.cuda.green_contexts": _by_torch,
    "sgl_kernel": _by_sgl_kernel,
    "flashinfer.green_ctx": _by_flashinfer,
    "cuda driver": _by_driver,
}


def partition_available(device: torch.device) -> tuple[str, dict[str, str]]:
    """Who can part a device's SMs, tried with its smallest pair, and why those before cannot.

    Raises
    ------
    CaseSkipped
        If nobody can; with the reasons.
    """
    total, capability = sm_facts(device)
    try:
        opened = open_split(_smallest(total, capability), device)
    except CaseInvalid as error:
        raise CaseSkipped(str(error)) from None
    try:
        return opened.provider, opened.passed_over
    finally:
        opened.close()


def _smallest(total: int, capability: tuple[int, int]) -> SmSplit:
    pairs = nearest((1, 1), total=total, capability=capability, count=1)
    if not pairs:
        raise CaseInvalid(f"SM partition: {total} SMs are too few for two parts")
    decode, prompt = pairs[0]
    return split(PartitionRequest(decode=decode, prompt=prompt), total=total, capability=capability)
