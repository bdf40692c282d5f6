"""The instrumented pass of the `nano` engine: memory by phase and by term, bytes of the pool. Never timed itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvsuite.meters.clock import clock_for
from kvsuite.meters.memory import AllocatorMeter, DriverMeter, resident_set_peak
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime

from .base import MemoryPass
from .intervals import IntervalClock
from .nano_runtime import pool_bytes, workspace_bytes


def measure_memory(
    loaded: LoadedModel, make: Callable[[], Runtime], request: Request, new_tokens: int, *, compresses: bool
) -> MemoryPass:
    """Serve one request with every memory meter on.

    The prefill phase begins before the runtime is made, so its peak holds the pool and, where decode steps are captured,
    what the graphs hold: a server has them from its start.

    Parameters
    ----------
    loaded
        The model.
    make
        Makes the runtime; an earlier one has been given back.
    request
        Has a prompt, and more tokens to go than are decoded here: its blocks are read before it ends.
    new_tokens
        Tokens decoded.
    compresses
        Whether a policy acts.
    """
    allocator = AllocatorMeter(loaded.device)
    allocator.settle()
    with DriverMeter(loaded.device).peak() as driver, resident_set_peak() as resident:
        with allocator.phase() as prefill:
            runtime = make()
            # tokens are counted as they come, so none may be under way
            overlap, runtime.overlap = runtime.overlap, False
            compress = IntervalClock(clock_for(loaded.device))
            _serve(runtime, request, 1, compress)
        lengths_prefill = stored_tokens(runtime, request)
        with allocator.phase() as decode:
            evict = IntervalClock(clock_for(loaded.device))
            _serve(runtime, request, new_tokens, evict)
        lengths = stored_tokens(runtime, request)
        blocks = sum(int(table.blocks[request.row]) for table in runtime.tables)
        used = sum(
            int(table.blocks[request.row]) * pool.block_bytes
            for table, pool in zip(runtime.tables, runtime.pools, strict=True)
        )
        runtime.cancel(request)
        runtime.overlap = overlap
    element = loaded.dtype.itemsize
    result = MemoryPass(
        prefill=prefill,
        decode=decode,
        resident=resident,
        driver=driver,
        kv_bytes_prefill=stored_bytes(runtime, lengths_prefill, element),
        kv_bytes_decode=stored_bytes(runtime, lengths, element),
        kv_bytes_allocated=runtime.pool_bytes,
        lengths_prefill=lengths_prefill,
        lengths_decode=lengths,
        compress_s=compress.total() if compresses else None,
        evict_s=evict.total() / max(new_tokens - 1, 1) if compresses else None,
        predicted={
            "pool_bytes": pool_bytes(runtime, element),
            "workspace_bytes": workspace_bytes(loaded, runtime.limits),
        },
        reported={"pool_bytes": runtime.pool_bytes, "kv_block_bytes": used, "kv_blocks": blocks},
    )
    if runtime.pool_bytes != result.predicted["pool_bytes"]:
        result.warnings.append(
            f"the pools hold {runtime.pool_bytes} bytes, {result.predicted['pool_bytes']} were predicted"
        )
    return result


def stored_tokens(runtime: Runtime, request: Request) -> list[int]:
    """Tokens of a running request that each layer holds."""
    found: dict[int, int] = {}
    for group, table in zip(runtime.groups, runtime.tables, strict=True):
        found |= dict.fromkeys(group.layers, int(table.lengths[request.row]))
    return [found[layer] for layer in sorted(found)]


def stored_bytes(runtime: Runtime, lengths: Sequence[int], element_bytes: int) -> int:
    """Bytes of the keys and values of that many tokens in each layer."""
    return sum(
        group.token_bytes(element_bytes) // len(group.layers) * lengths[layer]
        for group in runtime.groups
        for layer in group.layers
    )


def _serve(runtime: Runtime, request: Request, tokens: int, intervals: IntervalClock) -> None:
    """Step until a request has so many output tokens."""
    runtime.compression.on_interval = intervals
    try:
        if request.id is None:
            runtime.add(request)
        while request.output_length < tokens:
            if request.status.over:
                raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
            runtime.step()
    finally:
        runtime.compression.on_interval = None
