"""The instrumented pass of the `nano` engine: memory by phase and by term, bytes of the pool. Never timed itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvsuite.compression.merging import Merging
from kvsuite.engines.results import MemoryPass
from kvsuite.meters.clock import IntervalClock, clock_for
from kvsuite.meters.memory import AllocatorMeter, DriverMeter, resident_set_peak
from kvsuite.models.load import LoadedModel
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime

from .memory_model import prompt_kernel
from .runtime import pool_bytes, workspace_bytes


@dataclass(frozen=True)
class Holding:
    """What a running request holds: stored tokens of each layer, and blocks of each layer group."""

    lengths: list[int]
    blocks: list[int]


def measure_memory(
    loaded: LoadedModel,
    make: Callable[[], Runtime],
    requests: Sequence[Request],
    new_tokens: Sequence[int],
    *,
    compresses: bool = False,
    evicts: bool = False,
) -> MemoryPass:
    """Serve requests together with every memory meter on.

    The prefill phase begins before the runtime is made, so its peak holds the pool and, where decode steps are captured,
    what the graphs hold: a server has them from its start. It ends when every request has its first token.

    Parameters
    ----------
    loaded
        The model.
    make
        Makes the runtime; an earlier one has been given back.
    requests
        Have more tokens to go than are decoded here: their blocks are read before they end.
    new_tokens
        Tokens decoded for each of them.
    compresses
        Whether a policy acts.

    Returns
    -------
    MemoryPass
        Bytes are sums over the requests, lengths those of the longest.
    """
    allocator = AllocatorMeter(loaded.device)
    allocator.settle()
    with DriverMeter(loaded.device).peak() as driver, resident_set_peak() as resident:
        with allocator.phase() as prefill:
            runtime = make()
            # tokens are counted as they come, so none may be under way
            overlap, runtime.overlap = runtime.overlap, False
            compress = IntervalClock(clock_for(loaded.device))
            at_first = _serve(runtime, requests, [1] * len(requests), compress)
        with allocator.phase() as decode:
            evict = IntervalClock(clock_for(loaded.device))
            at_last = _serve(runtime, requests, new_tokens, evict)
        for request in requests:
            runtime.cancel(request)
        runtime.overlap = overlap
        runtime.refuse_vectors()
    element = loaded.dtype.itemsize
    blocks = [sum(held.blocks[group] for held in at_last) for group in range(len(runtime.groups))]
    result = MemoryPass(
        prefill=prefill,
        decode=decode,
        resident=resident,
        driver=driver,
        kv_bytes_prefill=sum(stored_bytes(runtime, held.lengths, element) for held in at_first),
        kv_bytes_decode=sum(stored_bytes(runtime, held.lengths, element) for held in at_last),
        kv_bytes_allocated=runtime.pool_bytes,
        lengths_prefill=_longest(at_first),
        lengths_decode=_longest(at_last),
        compress_s=compress.total() if compresses else None,
        evict_s=evict.total() / max(max(new_tokens) - 1, 1) if evicts else None,
        predicted={
            "pool_bytes": pool_bytes(runtime, element),
            "workspace_bytes": workspace_bytes(
                loaded, runtime.limits, runtime.groups, prompt_kernel(str(runtime.runner.facts["attention"]))
            )
            + waiting_bytes(runtime, requests, element),
        },
        reported={
            "pool_bytes": runtime.pool_bytes,
            "kv_block_bytes": sum(n * pool.block_bytes for n, pool in zip(blocks, runtime.pools, strict=True)),
            "kv_blocks": sum(blocks),
        },
    )
    if noted := [pool.notes.nbytes for pool in runtime.pools if pool.notes is not None]:
        result.reported["notes_bytes"] = sum(noted)
    if loaded.device.type == "cuda":
        result.reported["captured_bytes"] = runtime.runner.captured_bytes
    if runtime.pool_bytes != result.predicted["pool_bytes"]:
        result.warnings.append(
            f"the pools hold {runtime.pool_bytes} bytes, {result.predicted['pool_bytes']} were predicted"
        )
    return result


def _longest(held: Sequence[Holding]) -> list[int]:
    return [max(lengths) for lengths in zip(*(one.lengths for one in held), strict=True)]


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


def waiting_bytes(runtime: Runtime, requests: Sequence[Request], element_bytes: int) -> int:
    """Predicted bytes of what is made of prompts some layers after each token, and waits beside the pool for the others.

    Of all requests that were served so at a time, with their last layers: a controller decides it anew for later prompts.
    """
    policy = runtime.policy
    if not isinstance(policy, Merging):
        return 0
    tokens = sum(policy.size_of_prompt(one.prompt_length, one.image_spans) for one in requests if one.merged_after)
    return tokens * sum(group.token_bytes(element_bytes) for group in runtime.groups if group.compressed)


def _serve(
    runtime: Runtime, requests: Sequence[Request], tokens: Sequence[int], intervals: IntervalClock
) -> list[Holding]:
    """Step until every request had its number of output tokens; what each held when it got the last of them."""
    held: dict[Request, Holding] = {}
    runtime.compression.on_interval = intervals
    try:
        for request in requests:
            if request.id is None:
                runtime.add(request)
        while True:
            for request, wanted in zip(requests, tokens, strict=True):
                if request not in held and request.status.over:
                    raise RuntimeError(f"request {request.status.value}: {request.reason}") from request.error
                if request not in held and request.output_length >= wanted:
                    for table in runtime.tables:
                        # the next step would do it first: what the last token does not see nobody will
                        table.expire(request.row, request.computed - 1)
                    blocks = [int(table.blocks[request.row]) for table in runtime.tables]
                    held[request] = Holding(stored_tokens(runtime, request), blocks)
            if len(held) == len(requests):
                return [held[request] for request in requests]
            runtime.step()
    finally:
        runtime.compression.on_interval = None
