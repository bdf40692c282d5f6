"""Steps with prompts from captured layers: between two attentions one CUDA graph, for a number of tokens.

What attends depends on how many tokens each sequence brings and holds; everything else of a layer depends on the number of
tokens alone. So that is captured, from one attention to the next, for some numbers of tokens, and a step is padded to the next
of them: 37 launches for 36 layers, where there are nine a layer otherwise, each of which costs the host more than the device.
Prompts attend in between as they do elsewhere. Single tokens, which stand in front, have their attention captured as well, by
their number, and attend beside the prompts on a stream of their own. Steps of many tokens keep the device busy for longer than
the host takes to launch them, and are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .batch import StepBatch
from .decode_graphs import CapturableAttention, capture_stream
from .fused_layers import Destination, FusedDecoder
from .kv_pool import SCRATCH_BLOCK, KVPool
from .paged_attention import AttentionBackend
from .side_streams import side_stream
from .static_batch import fill, narrowed, pad, static_batch

#: tokens of a step whose layers are captured at most
MOST_TOKENS = 1024

Launch = Callable[[], None]


def layer_sizes(most: int) -> list[int]:
    """Numbers of tokens that get captured layers: as fine as products have tiles, up to the first that is ``most`` or more."""
    sizes = [*range(64, 512, 64), *range(512, MOST_TOKENS + 1, 128)]
    return [size for number, size in enumerate(sizes) if not number or sizes[number - 1] < most]


def _single_sizes(most: int) -> list[int]:
    """Numbers of single tokens that get captured attention: padding costs next to nothing."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return sizes


class CapturedLayers:
    """A fused decoder whose layers are replayed between attentions, for the numbers of tokens in ``sizes``.

    Padding rows are zeros in the scratch block. On a CPU, which captures nothing, the same launches run over the same static
    tensors one by one: to test everything else.

    Parameters
    ----------
    decoder
        Whose layers are captured.
    attention
        Attention of every step that is given to `hidden`, or what it stands for; its pools get the keys and values.
    sizes
        Numbers of tokens.
    max_sequences, max_blocks
        Sequences of a step, and blocks of the longest one.
    singles_apart
        Whether single tokens attend from a graph of their own.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        attention: CapturableAttention,
        sizes: Iterable[int],
        *,
        max_sequences: int,
        max_blocks: int,
        singles_apart: bool,
    ) -> None:
        self.sizes = sorted(set(sizes))
        self._decoder = decoder
        self._attention = attention
        self._pools: Sequence[KVPool] = attention.pools
        self._indices = range(len(decoder.layers))
        self._where = {
            layer: (number, index)
            for number, pool in enumerate(self._pools)
            for index, layer in enumerate(pool.group.layers)
        }
        self._single_sizes = _single_sizes(min(max_sequences, self.sizes[-1])) if singles_apart else []
        device = decoder.device
        rows = max([self.sizes[-1], *self._single_sizes])
        heads, head_dim = decoder.query_heads, decoder.head_dim
        vectors: Any = {"dtype": decoder.dtype, "device": device}
        self._residual = torch.zeros(rows, decoder.width, **vectors)
        # a row more than there are tokens takes what padding of the single tokens attends to
        self._query, self._mixed = (torch.zeros(rows + 1, heads, head_dim, **vectors) for _ in range(2))
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._slots = [torch.full((rows,), SCRATCH_BLOCK, dtype=torch.int64, device=device) for _ in self._pools]
        self._max_blocks = max_blocks
        self._singles: StepBatch | None = None
        self._beside = _Beside(device)
        if self._single_sizes:
            self._singles = static_batch(self._single_sizes[-1], len(self._pools), max_blocks, device)
            self._rows = torch.arange(self._single_sizes[-1], device=device)
            self._places = self._rows.clone()
        # a graph holds no tensor alive that it reads
        self._single_attentions: list[AttentionBackend] = []
        # launches of each layer, by tokens and by single tokens, which begin with one of no layer; the largest come first, and
        # others use their memory
        self._pieces = {size: self._layers(size) for size in reversed(self.sizes)}
        self._single_pieces = {size: self._single_layers(size) for size in reversed(self._single_sizes)}

    def rehearse(self) -> None:
        """Launch all of it once, uncaptured, where what that computes means nothing."""
        with torch.inference_mode():
            self._pad_singles()
            for pieces in (self._pieces, self._single_pieces):
                for launches in pieces.values():
                    for launch in launches:
                        launch()
            for static in (self._residual, self._query, self._mixed):
                static.zero_()

    def capture(self) -> None:
        """Replace launches by graphs that do the same, on CUDA."""
        if self._decoder.device.type != "cuda":
            return
        self._pad_singles()
        memory = torch.cuda.graph_pool_handle()
        for pieces in (self._pieces, self._single_pieces):
            for size, launches in pieces.items():
                pieces[size] = _captured(launches, memory)

    def size_for(self, batch: StepBatch) -> int | None:
        """Tokens of the layers that can run this batch, ``None`` if there are none."""
        return next((size for size in self.sizes if size >= batch.tokens), None)

    def hidden(self, batch: StepBatch, backend: AttentionBackend, *, whole: bool = False) -> Tensor | None:
        """What the final layer reads ``[R, hidden]`` of ``batch.sample_rows``; ``None`` for a step that has too many tokens.

        Parameters
        ----------
        batch
            The step.
        backend
            Its attention, which is begun here.
        whole
            Whether it has to be given all tokens, single ones too.
        """
        size = self.size_for(batch)
        if size is None:
            return None
        tokens = batch.tokens
        with torch.inference_mode():
            self._fill(batch, size)
            attend: list[Launch] = []
            singles = 0 if whole else self._apart(batch)
            if singles:
                attend = self._fill_singles(batch, singles)
            others = batch.part(singles, batch.sequences) if singles else batch
            if others.sequences:
                backend.begin(others)
            query, mixed = self._query[singles:tokens], self._mixed[singles:tokens]
            for index, launch in enumerate(self._pieces[size]):
                launch()
                if not others.sequences:
                    attend[index]()
                    continue
                if singles:
                    self._beside.launch(attend[index])
                backend.attend(index, query, self._decoder.scale, mixed)
                if singles:
                    self._beside.join()
            rows = batch.sample_rows
            return self._decoder.last(self._mixed.flatten(1)[rows], self._residual[rows])

    def _fill(self, batch: StepBatch, size: int) -> None:
        """Bring a step's tokens, and make the rest padding: what an earlier step left there would be stored once more."""
        tokens = batch.tokens
        self._residual[:tokens].copy_(self._decoder.embedded(batch))
        self._positions[:tokens].copy_(batch.positions)
        for own, part in zip(self._slots, batch.groups, strict=True):
            own[:tokens].copy_(part.slots)
        if tokens < size:
            # zeros stay zeros, where what is left of a step would be added to in every one that follows
            self._residual[tokens:size].zero_()
            self._mixed[tokens:size].zero_()
            self._positions[tokens:size].zero_()
            for own in self._slots:
                own[tokens:size].fill_(SCRATCH_BLOCK)

    def _apart(self, batch: StepBatch) -> int:
        """Single tokens in front that attend from a graph."""
        static = self._singles
        if static is None or batch.groups[0].width > self._max_blocks:
            return 0
        counts = batch.query_start_host.diff().tolist()
        singles = next((at for at, count in enumerate(counts) if count != 1), len(counts))
        return singles if singles <= self._single_sizes[-1] else 0

    def _fill_singles(self, batch: StepBatch, singles: int) -> list[Launch]:
        assert self._singles is not None
        size = next(size for size in self._single_sizes if size >= singles)
        fill(narrowed(self._singles, size), batch.part(0, singles))
        begin, *attend = self._single_pieces[size]
        begin()
        # behind the single tokens stand prompts, which attend at the same time
        self._places[singles:size].fill_(len(self._mixed) - 1)
        return attend

    def _pad_singles(self) -> None:
        """As they are at first; for what fills them to be compiled."""
        if self._singles is not None:
            pad(self._singles)

    def _layers(self, size: int) -> list[Launch]:
        destination = self._destination(size)
        return [partial(self._piece, index, size, destination) for index in self._indices]

    def _piece(self, index: int, size: int, destination: Destination) -> None:
        """From the attention of the layer before to that of this one."""
        residual, delta = self._residual[:size], None
        if index:
            delta = self._decoder.feed_forward(index - 1, self._mixed[:size].flatten(1), residual)
        self._decoder.queries(index, delta, residual, self._positions[:size], destination, self._query[:size])

    def _destination(self, size: int) -> Destination:
        slots = [own[:size] for own in self._slots]

        def destination(layer: int) -> Any:
            number, index = self._where[layer]
            return (*self._pools[number].layer(index), slots[number])

        return destination

    def _single_layers(self, size: int) -> list[Launch]:
        """What every step of a size begins with, and the attention of each layer."""
        assert self._singles is not None
        batch = narrowed(self._singles, size)
        attention = self._attention.captured(batch)
        self._single_attentions.append(attention)

        def begin() -> None:
            self._places.copy_(self._rows)
            attention.begin(batch)

        def attend(index: int) -> None:
            found = attention.attend(index, self._query[:size], self._decoder.scale)
            self._mixed.index_copy_(0, self._places[:size], found)

        # in a graph of its own: what reads the order may begin before a kernel in front of it in the same graph ends
        return [begin, *(partial(attend, index) for index in self._indices)]


class _Beside:
    """A stream beside the current one: a few prompts' attention leaves a good part of the SMs to that of single tokens."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            self._stream, self._begun, self._ended = side_stream("single tokens", device), event(), event()

    def launch(self, launch: Launch) -> None:
        """Launch something behind all that the current stream was given, and beside what it is given until `join`."""
        if self._stream is None:
            launch()
            return
        self._begun.record()
        self._stream.wait_event(self._begun)
        with torch.cuda.stream(self._stream):
            launch()
            self._ended.record()

    def join(self) -> None:
        """Let what the current stream is given from now on come behind it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._ended)


def _captured(launches: list[Launch], memory: Any) -> list[Launch]:
    """Replays of launches that read and write static tensors alone, one graph each."""
    current, side = torch.cuda.current_stream(), capture_stream(torch.cuda.current_device())
    replays: list[Launch] = []
    side.wait_stream(current)
    with torch.inference_mode(), torch.cuda.stream(side):
        # what is compiled or allocated at first use must not be captured
        for launch in launches:
            launch()
        side.synchronize()
        for launch in launches:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=memory)
            try:
                launch()
            finally:
                graph.capture_end()
            replays.append(graph.replay)
    current.wait_stream(side)
    return replays
