"""Paged attention on CUDA: FlashInfer's kernels, planned on the host once a step, and one of ours, which needs no plan.

Prompts go through FlashInfer, on Hopper through its ``fa3``; single tokens through `split_attention`. Through the reference
go layers with keys that are placed in the cache, and prompts of layers with a window. Captured steps: `flashinfer_captured`.

Of packed pages, single tokens read the codes (`packed_split_attention`); for prompts, the blocks of their sequences are
unpacked one behind the other, layer by layer, so that they too see what is stored, their own chunk included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvsuite.errors import CaseSkipped

from . import cuda_driver
from .batch import StepBatch
from .flashinfer_captured import FEW_PROGRAMS, CapturedAttention, FlashInferLayers, split
from .kv_pool import KVPool
from .layer_pages import LayerPages
from .reference_attention import KeyRotation, ReferenceAttention

_WORKSPACE_BYTES = 256 << 20
INSTALL = (
    "pip install --no-deps flashinfer-python==0.6.1 apache-tvm-ffi==0.1.13.post3 nvidia-cudnn-frontend, "
    "and pip install einops tabulate ninja"
)


def flashinfer_module() -> Any:
    """Import FlashInfer.

    Raises
    ------
    CaseSkipped
        If it is not installed.
    """
    try:
        import flashinfer  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise CaseSkipped(f"paged attention on CUDA needs FlashInfer ({error}); {INSTALL}") from error
    return flashinfer


class FlashInferAttention(FlashInferLayers):
    """Attention of steps of any make-up; `captured` makes one for a graph.

    Parameters
    ----------
    pools
        Keys and values of every layer group, read in bfloat16 or float16, on CUDA.
    query_heads
        Query heads of a layer.
    rotation
        For groups that place their keys in the cache.
    prompt_backend
        FlashInfer's backend for prompts, ``fa2`` or ``fa3``; ``None`` takes ``fa3`` on Hopper, which alone has it.

    Raises
    ------
    CaseSkipped
        If FlashInfer is not installed.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        *,
        query_heads: int,
        rotation: KeyRotation | None = None,
        prompt_backend: str | None = None,
    ) -> None:
        super().__init__(pools)
        self.flashinfer = flashinfer_module()
        self.query_heads = query_heads
        device = self.pools[0].device
        # FlashInfer wants it zeroed at first use
        self.workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        self.prompt_backend = prompt_backend or ("fa3" if hopper else "fa2")
        self._given: dict[str, Any] = {
            "query_heads": query_heads, "rotation": rotation, "prompt_backend": prompt_backend
        }  # fmt: skip
        self._exact = ReferenceAttention(pools, rotation)
        self._by_reference = [pool.group.places for pool in self.pools]
        wrapper = self.flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._prompts = [
            None
            if pool.group.places or pool.group.window is not None
            else wrapper(self.workspace, "NHD", backend=self.prompt_backend)
            for pool in self.pools
        ]
        # single tokens stand in front; what follows them goes through FlashInfer
        self._singles = 0
        #: blocks of the prompts' sequences, by group, where they have to be unpacked
        self._to_unpack: dict[int, Tensor] = {}

    def _look_at_stream(self) -> None:
        """Keys are cut for as many SMs as the current stream has: lanes move between partitions."""
        self.processors = _processors(self.workspace.device)

    def beside(self) -> FlashInferAttention:
        """The same for steps of another lane, whose stream is the current one, with a workspace of its own."""
        return FlashInferAttention(self.pools, **self._given)

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
                else f"{'reference' if wrapper is None else f'flashinfer {self.prompt_backend}'}, single tokens split"
                + f" in {pool.group.format}" * pool.is_packed
                for exact, wrapper, pool in zip(self._by_reference, self._prompts, self.pools, strict=True)
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
        if singles == batch.sequences:
            return
        for number, (wrapper, pool, part) in enumerate(zip(self._prompts, self.pools, batch.groups, strict=True)):
            if wrapper is None:
                continue
            lengths = part.kv_lengths_host.numpy()[singles:]
            used = -(-lengths // pool.block_size)
            tables = part.block_tables_host.numpy()[singles:]
            blocks = torch.from_numpy(tables[np.arange(tables.shape[1])[None] < used[:, None]])
            if pool.is_packed:
                self._to_unpack[number] = blocks.to(pool.device)
                blocks = torch.arange(len(blocks), dtype=torch.int32)
            wrapper.plan(
                torch.from_numpy(starts[singles:] - starts[singles]),
                torch.from_numpy(_starts(used)),
                blocks,
                torch.from_numpy((lengths - (used - 1) * pool.block_size).astype(np.int32)),
                self.query_heads,
                pool.group.kv_heads,
                pool.group.head_dim,
                pool.block_size,
                causal=True,
                q_data_type=pool.dtype,
                kv_data_type=pool.dtype,
                non_blocking=False,
            )

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        number, _, _ = self._where[layer]
        if self._by_reference[number]:
            self._exact.write(layer, key, value)
        else:
            super().write(layer, key, value)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        number, index, pool = self._where[layer]
        wrapper, singles = self._prompts[number], self._singles
        with_prompts = singles < self._batch.sequences
        if self._by_reference[number] or (wrapper is None and with_prompts):
            return self._exact.attend(layer, query, scale)
        keys, values = pool.layer(index)
        query = query.contiguous()
        mixed = []
        if singles:
            mixed.append(split(query[:singles], pool, keys, values, self._batch.groups[number], scale, self.processors))
        if wrapper is not None and with_prompts:
            factor = scale * pool.group.head_dim**0.5
            stored = tuple(self._readable(number, side) for side in (keys, values))
            mixed.append(wrapper.run(query[singles:], stored, q_scale=None if factor == 1 else factor))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _readable(self, number: int, pages: LayerPages) -> Tensor:
        """Pages that FlashInfer's plan of the step's prompts can read."""
        pool = self.pools[number]
        if not pool.is_packed:
            return pages.codes
        from .packed_vectors import unpack_pages

        blocks = self._to_unpack[number]
        out = torch.empty(pool.unpacked_shape(len(blocks)), dtype=pool.dtype, device=pool.device)
        unpack_pages(pages, blocks, out)
        return out

    def captured(self, batch: StepBatch, few_programs: int = FEW_PROGRAMS) -> CapturedAttention:
        """Attention of decode steps of one size, to be captured over the static tensors of ``batch``."""
        self._look_at_stream()
        return CapturedAttention(self, batch, few_programs)


def _processors(device: torch.device) -> int:
    """SMs that the current stream may use: all of the device, or those of its green context."""
    every = int(torch.cuda.get_device_properties(device).multi_processor_count)
    stream = torch.cuda.current_stream(device)
    if stream == torch.cuda.default_stream(device):
        return every
    try:
        own = cuda_driver.sms_of(stream.cuda_stream)
    except cuda_driver.DriverError:
        # a driver that knows no green contexts has none
        return every
    return every if own is None else own


def _starts(counts: Any) -> Any:
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts
