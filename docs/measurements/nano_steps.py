"""A runtime in which every request decodes, without its prompt having been computed: for the parts of nano_serving.py."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from nano_session import BLOCK, Session

from kvsuite.nanovllm.cuda_runner import CudaRunner
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.runtime import Runtime
from kvsuite.nanovllm.sampling import SamplingParameters


class Decoding:
    """A runtime in which every request decodes, over keys that were never computed: its prompts' steps are left out."""

    def __init__(self, session: Session, runtime: Runtime, batch: int, length: int) -> None:
        self.session, self.runtime, self.batch, self.length = session, runtime, batch, length
        run = runtime.runner.run
        logits = torch.zeros(batch, runtime.vocab_size, dtype=runtime.pools[0].dtype, device=session.device)
        content = random.Random(length)
        prompt = [content.randrange(runtime.vocab_size) for _ in range(length)]
        for _ in range(batch):
            runtime.add(Request(prompt, SamplingParameters(max_new_tokens=session.shapes.margin, ignore_eos=True)))
        runtime.runner.run = lambda step: logits[: step.sample_rows.shape[0]]
        try:
            while any(request.pending > 1 for request in runtime.scheduler.running) or runtime.scheduler.waiting:
                runtime.step()
        finally:
            runtime.runner.run = run
        assert len(runtime.scheduler.running) == batch

    def time(self, steps: int) -> tuple[float, float]:
        """Seconds of a step, and of the host's part of it."""
        runtime, synchronize = self.runtime, self.session.synchronize
        runtime.step()
        synchronize()
        waited, started = runtime.waited_s, time.perf_counter()
        for _ in range(steps):
            runtime.step()
        host = time.perf_counter() - started - (runtime.waited_s - waited)
        # the last step's tokens are under way, as were those of the one before the first
        synchronize()
        return (time.perf_counter() - started) / steps, host / steps

    def floor_s(self) -> float:
        assert isinstance(self.runtime.runner, CudaRunner)
        decoder = self.runtime.runner.decoder
        weights = (
            self.session.model(self.session.shapes.large).weights_bytes if decoder is None else decoder.weight_bytes
        )
        pool = self.runtime.pools[0]
        live = sum(int(request.computed) for request in self.runtime.scheduler.running)
        return (weights + live * pool.block_bytes / pool.block_size) / self.session.bandwidth

    def end(self) -> None:
        for request in list(self.runtime.scheduler.running):
            self.runtime.cancel(request)
        while self.runtime.unfinished:
            self.runtime.step()
        self.runtime.step()


def scatter(runtime: Runtime) -> None:
    """Random keys, and free blocks in a random order: as after hours of service."""
    for pool in runtime.pools:
        # packed pages are filled with copies of some blocks
        blocks = min(pool.num_blocks + 1, 512)
        slots = torch.arange(blocks * pool.block_size, device=pool.device)
        shape = (len(slots), pool.group.kv_heads, pool.group.head_dim)
        copies = torch.arange(pool.num_blocks + 1, device=pool.device) % blocks
        for index in range(len(pool.group.layers)):
            pages = pool.layer(index)
            if pool.is_packed:
                pool.store(index, slots, *(torch.randn(shape, device=pool.device).to(pool.dtype) for _ in pages))
                for tensor in (tensor for side in pages for tensor in side[:2] if tensor.numel()):
                    torch.index_select(tensor[:blocks].clone(), 0, copies, out=tensor)
            else:
                for side in pages:
                    side.codes.normal_()
    for table in runtime.tables:
        blocks = list(table.pool._free)
        random.Random(0).shuffle(blocks)
        table.pool._free.clear()
        table.pool._free.update(dict.fromkeys(blocks))


def long_limits(session: Session, batches: Any, longest: int, most: int) -> dict[str, Any]:
    loaded = session.model(session.shapes.large)
    config = loaded.text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * loaded.dtype.itemsize
    seqs = max(batches)
    return {
        "max_model_len": longest, "max_num_seqs": seqs, "max_num_batched_tokens": 1 << 20, "prefix_caching": False,
        "num_blocks": min(most, session.room() // (token_bytes * BLOCK)),
    }  # fmt: skip
