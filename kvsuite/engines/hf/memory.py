"""The instrumented pass of the `hf` engine: memory by phase, bytes of the cache, time of compression. Never timed itself."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsuite.engines.results import MemoryPass
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import IntervalClock, clock_for
from kvsuite.meters.memory import AllocatorMeter, DriverMeter, resident_set_peak

from .cache import EvictionCache

if TYPE_CHECKING:
    from .generation import AnyCache, Generation

# chunked presses keep whole chunks: 0.52 was seen where 0.5 was asked of 512 tokens
_RATIO_TOLERANCE = 0.05


def measure_memory(generation: Generation, ids: Tensor, new_tokens: int, pixels: Tensor | None = None) -> MemoryPass:
    """Prefill and decode once with every memory meter on; ``pixels`` are the prompt's images.

    The decode steps are eager also where the timed ones are captured, so a graph's private pool is in no number.
    """
    generation.drop_cache()
    allocator = AllocatorMeter(generation.device)
    allocator.settle()
    method = generation.method
    with (
        torch.inference_mode(),
        DriverMeter(generation.device).peak() as driver,
        resident_set_peak() as resident,
        generation.pressed(),
    ):
        compress = IntervalClock(clock_for(generation.device))
        with allocator.phase() as prefill:
            cache: AnyCache = generation.new_cache(ids.shape[1], new_tokens - 1)
            if isinstance(cache, EvictionCache):
                cache.on_interval = compress if method.policy else None
                token = generation.prefill(ids, cache, pixels)
            elif generation.press is None:
                token = generation.prefill(ids, cache, pixels)
            else:
                with generation.press.timed(compress):
                    token = generation.prefill(ids, cache, pixels)
        compress_s = compress.total()
        live, lengths = _live_bytes(cache), cache.lengths()
        with allocator.phase() as decode:
            cache = generation.settle(cache, new_tokens - 1)
            evict = IntervalClock(clock_for(generation.device))
            with contextlib.ExitStack() as timed:
                if isinstance(cache, EvictionCache) and method.policy:
                    cache.on_interval = evict
                elif generation.press is not None and method.acts_in_decode:
                    timed.enter_context(generation.press.timed(evict))
                for _ in range(new_tokens - 1):
                    token = generation.step(token, cache)
        evict_s = evict.total() / max(new_tokens - 1, 1)
        allocated, headroom = cache.kv_bytes()
        states = cache.state_bytes() if isinstance(cache, EvictionCache) else 0
    result = MemoryPass(
        prefill=prefill,
        decode=decode,
        resident=resident,
        driver=driver,
        kv_bytes_prefill=live,
        kv_bytes_decode=allocated - headroom,
        kv_bytes_allocated=allocated,
        lengths_prefill=lengths,
        lengths_decode=cache.lengths(),
        compress_s=compress_s if method.policy or method.press else None,
        evict_s=evict_s if method.acts_in_decode else None,
    )
    result.warnings += method.caveats(ids.shape[1])
    if states:
        result.reported["state_bytes"] = states
        result.warnings.append(
            f"recurrent layers carry states of {states} bytes, which the bytes of the cache leave out"
        )
    if isinstance(cache, EvictionCache):
        cache.refuse_vectors()
    counted = generation.kv_bytes(result.lengths_decode, ids.shape[1] + new_tokens - 1)
    if generation.foreign is None and counted != result.kv_bytes_decode:
        result.warnings.append(
            f"the cache's storages hold {result.kv_bytes_decode} bytes, its tokens {counted}: something is kept alive"
        )
    generation.drop_cache()
    _check_ratio(generation, live, ids.shape[1])
    return result


def _check_ratio(generation: Generation, live: int, prompt_tokens: int) -> None:
    """A press that silently did nothing (prefilled in chunks, say) must not pass for one that compressed."""
    press, asked = generation.method.press, generation.method.ratio_requested
    if press is None or asked is None or not press.info.frees_memory or "decode" in press.info.compresses:
        return
    removed = 1 - live / generation.decoder.kv_bytes(generation.decoder.full_lengths(prompt_tokens))
    if abs(removed - asked) > _RATIO_TOLERANCE:
        raise CaseInvalid(
            f"{press.name} was asked to remove {asked:.3f} of the prompt's cache and removed {removed:.3f}"
        )


def _live_bytes(cache: AnyCache) -> int:
    allocated, headroom = cache.kv_bytes()
    return allocated - headroom
