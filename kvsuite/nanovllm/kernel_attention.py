"""Paged attention on CUDA: prompts through `prompt_attention`, single tokens through `split_attention`, which needs no plan.

Through the reference go layers with keys that are placed in the cache, and prompts of layers with a window. Captured steps:
`captured_attention`. Where FlashInfer's libraries are not built, torch's kernels and our own do all of it.

Of packed pages, single tokens read the codes (`packed_split_attention`); for prompts, the blocks of their sequences are
unpacked one behind the other, layer by layer, so that they too see what is stored, their own chunk included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import StepBatch
from .captured_attention import CapturedAttention, PooledLayers, order_of
from .flashinfer_libraries import FA3, Libraries, flashinfer_module, takes_flashinfer
from .kv_pool import KVPool
from .paged_attention import written_to
from .prompt_attention import FlashInferPrompts, HopperPrompts, PromptAttention, PromptRows, TorchPrompts
from .reference_attention import KeyRotation, ReferenceAttention
from .side_streams import processors

_WORKSPACE_BYTES = 256 << 20


class KernelAttention(PooledLayers):
    """Attention of steps of any make-up; `captured` makes one for a graph.

    Parameters
    ----------
    pools
        Keys and values of every layer group, read in bfloat16 or float16, on CUDA.
    query_heads
        Query heads of a layer.
    libraries
        What FlashInfer has for them. Without any nothing of FlashInfer is called.
    rotation
        For groups that place their keys in the cache.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        *,
        query_heads: int,
        libraries: Libraries,
        rotation: KeyRotation | None = None,
    ) -> None:
        super().__init__(pools)
        self.libraries = libraries
        self.query_heads = query_heads
        self.device = self.pools[0].device
        self.flashinfer = flashinfer_module() if libraries.prompts else None
        # FlashInfer wants it zeroed at first use
        size = _WORKSPACE_BYTES if libraries.prompts else 0
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._given: dict[str, Any] = {"query_heads": query_heads, "libraries": libraries, "rotation": rotation}
        self._exact = ReferenceAttention(pools, rotation)
        self._by_reference = [pool.group.places for pool in self.pools]
        self._prompts = [self._prompt_attention(pool) if takes_flashinfer(pool) else None for pool in self.pools]
        # single tokens stand in front; what follows them are prompts
        self._singles = 0

    def _prompt_attention(self, pool: KVPool) -> PromptAttention:
        library = self.libraries.prompts
        if library is None:
            return TorchPrompts(pool)
        if library == FA3:
            return HopperPrompts(self.flashinfer, pool, self.query_heads, self.workspace)
        return FlashInferPrompts(self.flashinfer, pool, self.query_heads, self.workspace, library)

    def _look_at_stream(self) -> None:
        """Keys are cut for as many SMs as the current stream has: lanes move between partitions."""
        self.processors = processors(self.device)

    def beside(self) -> KernelAttention:
        """The same for steps of another lane, whose stream is the current one, with a workspace of its own."""
        return KernelAttention(self.pools, **self._given)

    @property
    def capturable(self) -> bool:
        """Whether every group's decode attention can be captured."""
        return not any(self._by_reference)

    @property
    def why_not_capturable(self) -> str:
        """What stands against it."""
        return "keys placed in the cache go through the reference"

    @property
    def effective(self) -> dict[str, Any]:
        """What attends, by group."""
        return {
            "attention": [
                "reference"
                if exact
                else f"{'reference' if prompts is None else prompts.name}, single tokens split"
                + f" in {pool.group.format}" * pool.is_packed
                for exact, prompts, pool in zip(self._by_reference, self._prompts, self.pools, strict=True)
            ]
        }

    def begin(self, batch: StepBatch) -> None:
        self._batch = batch
        self._look_at_stream()
        if None in self._prompts:
            self._exact.begin(batch)
        starts = batch.query_start_host.numpy()
        longer = np.flatnonzero(np.diff(starts) != 1)
        self._singles = singles = int(longer[0]) if len(longer) else batch.sequences
        with_prompts = singles < batch.sequences
        self._orders = [
            None if exact or (prompts is None and with_prompts) else order_of(part, singles)
            for exact, prompts, part in zip(self._by_reference, self._prompts, batch.groups, strict=True)
        ]
        if not with_prompts:
            return
        for prompts, part in zip(self._prompts, batch.groups, strict=True):
            if prompts is not None:
                lengths, tables = part.kv_lengths_host.numpy(), part.block_tables_host.numpy()
                prompts.plan(PromptRows(starts[singles:] - starts[singles], lengths[singles:], tables[singles:]))

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        number, _, _ = self._where[layer]
        if self._by_reference[number]:
            self._exact.write(layer, key, value)
        else:
            super().write(layer, key, value)

    def attend(self, layer: int, query: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
        number, index, pool = self._where[layer]
        prompts, singles = self._prompts[number], self._singles
        with_prompts = singles < self._batch.sequences
        if self._by_reference[number] or (prompts is None and with_prompts):
            return self._exact.attend(layer, query, scale, out)
        query = query.contiguous()
        if prompts is None or not with_prompts:
            return written_to(out, self.single(layer, query, scale))
        out = torch.empty_like(query) if out is None else out
        if singles:
            out[:singles].copy_(self.single(layer, query[:singles], scale))
        prompts.attend(query[singles:], *pool.layer(index), scale, out[singles:])
        return out

    def captured(self, batch: StepBatch) -> CapturedAttention:
        """Attention of decode steps of one size, to be captured over the static tensors of ``batch``."""
        self._look_at_stream()
        return CapturedAttention(self, batch)
