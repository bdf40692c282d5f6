"""Decode steps as CUDA graphs: one graph a batch size, over tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import StepBatch
from .kv_pool import KVPool
from .paged_attention import AttentionBackend
from .side_streams import side_stream
from .static_batch import fill, narrowed, pad, static_batch

Forward = Callable[[StepBatch, AttentionBackend], Tensor]


class StaticAttention(AttentionBackend, Protocol):
    """Decode attention over the static tensors of one batch size."""

    #: what attends, by layer group
    kinds: list[str]


class CapturableAttention(Protocol):
    """Attention that can be cut to static tensors."""

    @property
    def pools(self) -> Sequence[KVPool]:
        """Keys and values of every layer group."""

    @property
    def capturable(self) -> bool:
        """Whether all groups can be captured."""

    @property
    def why_not_capturable(self) -> str:
        """What stands against it."""

    def captured(self, batch: StepBatch) -> StaticAttention:
        """Attention of decode steps over the static tensors of ``batch``."""


def default_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: finer where a padding row costs a larger share of the step."""
    sizes = [size for size in (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112) if size < most]
    return [*sizes, *range(128, most, 32), most]


class DecodeGraphs:
    """Captured decode steps for the batch sizes of ``sizes``; smaller batches are padded to the next one.

    Padding rows are sequences of one token in the scratch block. On a CPU, which captures nothing, the same steps run over
    the same static tensors one by one: to test everything else.

    Parameters
    ----------
    forward
        ``forward(batch, backend) -> logits [R, vocab]``, the backend having begun the step; it must not wait for the device.
        `FusedDecoder.logits`, or a transformers model inside `attending`.
    attention
        Whose pools the graphs use; all its groups have to be `capturable`.
    sizes
        Batch sizes.
    max_blocks
        Blocks of the longest sequence.
    """

    def __init__(
        self,
        forward: Forward,
        attention: CapturableAttention,
        sizes: Iterable[int],
        max_blocks: int,
    ) -> None:
        assert attention.capturable
        self._forward = forward
        self._attention = attention
        self.sizes = sorted(set(sizes))
        self._static = static_batch(self.sizes[-1], len(attention.pools), max_blocks, attention.pools[0].device)
        self._attentions: dict[int, tuple[StepBatch, StaticAttention]] = {}
        self._steps: dict[int, _Step] = {}
        self._memory: Any = None

    @property
    def kinds(self) -> dict[int, str]:
        """What attends, by captured size."""
        return {size: ", ".join(dict.fromkeys(self._steps[size].attention.kinds)) for size in sorted(self._steps)}

    def rehearse(self) -> None:
        """Run every size once, uncaptured."""
        for size in self.sizes:
            batch, attention = self._static_attention(size)
            pad(batch)
            attention.begin(batch)
            with torch.inference_mode():
                self._forward(batch, attention)

    def _static_attention(self, size: int) -> tuple[StepBatch, StaticAttention]:
        """The batch of a size, and the attention over it, which is made once."""
        if size not in self._attentions:
            batch = narrowed(self._static, size)
            self._attentions[size] = (batch, self._attention.captured(batch))
        return self._attentions[size]

    def capture(self) -> None:
        """Capture all sizes; the largest comes first, the others use its memory."""
        for size in reversed(self.sizes):
            self.step(size)

    def step(self, size: int) -> _Step:
        """The captured step of one of the sizes; captured now if it was not yet."""
        if size not in self._steps:
            step = _Step(self._forward, *self._static_attention(size), self._memory)
            self._memory = step.memory
            self._steps[size] = step
        return self._steps[size]

    def size_for(self, batch: StepBatch) -> int | None:
        """Size of the graph that can run this batch, ``None`` if there is none."""
        if not batch.decode_only or batch.images is not None or batch.sample_rows.shape[0] != batch.sequences:
            return None
        if batch.groups[0].width > self._static.groups[0].width:
            return None
        return next((size for size in self.sizes if size >= batch.sequences), None)

    def run(self, batch: StepBatch) -> Tensor | None:
        """Logits ``[S, vocab]`` of a decode step, or ``None`` for a batch that no graph can run.

        They are overwritten by the next step.
        """
        size = self.size_for(batch)
        if size is None:
            return None
        step = self.step(size)
        fill(step.batch, batch)
        step.replay()
        return step.logits[: batch.sequences]


class _Step:
    """One batch size, captured."""

    def __init__(self, forward: Forward, batch: StepBatch, attention: StaticAttention, memory: Any) -> None:
        self.batch = batch
        self.attention = attention
        self.memory: Any = None
        self._forward = forward
        self._graph: Any = None
        pad(batch)
        with torch.inference_mode():
            if batch.ids.device.type == "cuda":
                self._capture(memory)
            else:
                self.logits = self._once()

    def _once(self) -> Tensor:
        self.attention.begin(self.batch)
        return self._forward(self.batch, self.attention)

    def _capture(self, memory: Any) -> None:
        # what is compiled or allocated at first use must not be captured
        side = capture_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._once()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, stream=side):
            self.logits = self._once()
        self.memory = self._graph.pool()

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        with torch.inference_mode():
            self.logits = self._once()


def capture_stream(device: int) -> Any:
    """The current stream where that is a lane's: a graph keeps the SMs of the stream that it was captured on."""
    current = torch.cuda.current_stream(device)
    return side_stream("captures", device) if current == torch.cuda.default_stream(device) else current
