"""The tensors of one step. They are laid out in one buffer, so that one copy brings them to the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .device_tables import GatheredRows, TableRows

Ints = NDArray[np.int64]
_ALIGNED = 16
# steps of so many different shapes are remembered
_LAYOUTS = 64


@dataclass(frozen=True)
class GroupInputs:
    """What one layer group contributes to a step, as numpy arrays of the host.

    Parameters
    ----------
    slots
        Where each new token's key and value go: ``block * block_size + offset``, int64 ``[T]``.
    kv_lengths
        Tokens in the cache after this step, ``[S]``.
    block_tables
        Rows of tables that are kept on the device, or an array ``[S, max_blocks]``; entries behind a sequence's last block
        are 0, the scratch block.
    dropped
        Tokens between the sinks' blocks and the window whose blocks are free again, ``[S]``; zeros without a window.
    places
        For groups that rotate keys by place: the rank in time of every stored token of each sequence, int64 ``[n]`` or
        ``[layers, kv_heads, n]``, ``None`` where the order of the table is that of time. Else empty.
    """

    slots: Ints
    kv_lengths: NDArray[np.int64]
    block_tables: TableRows | NDArray[np.int32]
    dropped: NDArray[np.int64]
    places: Sequence[Tensor | None] = ()


@dataclass(frozen=True)
class GroupBatch:
    """One layer group's part of a `StepBatch`: tensors on the device, and views of the same numbers on the host.

    All of them hold until the next batch is built.
    """

    slots: Tensor
    kv_lengths: Tensor
    #: `block_tables`, or where they are gathered from
    tables: Tensor | GatheredRows
    dropped: Tensor
    kv_lengths_host: Tensor
    dropped_host: Tensor
    #: reads `block_tables_host`, which few steps ask for
    read_tables: Callable[[], NDArray[np.int32]]
    places: Sequence[Tensor | None] = ()

    @cached_property
    def block_tables(self) -> Tensor:
        """Block tables, int32 ``[S, width]``. Gathered when they are first asked for; captured steps gather their own."""
        return self.tables if isinstance(self.tables, Tensor) else self.tables.gather()

    @property
    def width(self) -> int:
        """Entries of every sequence's block table."""
        return int(self.tables.shape[1]) if isinstance(self.tables, Tensor) else self.tables.width

    @property
    def block_tables_host(self) -> Tensor:
        """``block_tables`` on the host, before anything is planned that comes after this step."""
        return torch.from_numpy(self.read_tables())

    def part(self, sequences: slice, tokens: slice) -> GroupBatch:
        """Some sequences, whose tokens are these."""
        return GroupBatch(
            slots=self.slots[tokens],
            kv_lengths=self.kv_lengths[sequences],
            tables=self.block_tables[sequences],
            dropped=self.dropped[sequences],
            kv_lengths_host=self.kv_lengths_host[sequences],
            dropped_host=self.dropped_host[sequences],
            read_tables=lambda: self.read_tables()[sequences],
            places=self.places[sequences],
        )


@dataclass(frozen=True)
class ImageRows:
    """What stands in the place of some tokens' embeddings.

    Parameters
    ----------
    rows
        Rows of the step, int64 ``[n]``.
    features
        Of images, ``[n, hidden]``.
    """

    rows: Tensor
    features: Tensor

    def into(self, embedded: Tensor) -> Tensor:
        """Put them into embeddings ``[T, hidden]``, which are written to."""
        return embedded.index_copy_(0, self.rows, self.features.to(embedded.dtype))


@dataclass(frozen=True)
class StepBatch:
    """Tokens of several sequences, one behind the other, in one forward pass.

    Parameters
    ----------
    fed
        Token ids as the host knows them, int64 ``[T]``: a negative one stands for a token in flight (`TokensInFlight`).
    positions
        Position ids that the model gets, int64 ``[T]``.
    query_start
        Row of every sequence's first token, and ``T``, int32 ``[S + 1]``.
    sample_rows
        Rows whose logits are wanted, int64 ``[R]``.
    groups
        Per layer group: int64 slots ``[T]``, int32 KV lengths ``[S]``, block tables ``[S, max_blocks]``.
    decode_only
        Whether every sequence has exactly one token.
    query_start_host
        ``query_start`` on the host.
    spans
        Where rotary frequencies change with the length: what decides those of every token (`SequenceRotary`), int64 ``[T]``.
    images
        Features in the place of image tokens, ``None`` for a step of text alone.
    in_flight
        The tokens that negative ids stand for, int64 ``[n]``; ``None`` where there are no such ids.
    """

    fed: Tensor
    positions: Tensor
    query_start: Tensor
    sample_rows: Tensor
    groups: tuple[GroupBatch, ...]
    decode_only: bool
    query_start_host: Tensor
    spans: Tensor | None = None
    images: ImageRows | None = None
    in_flight: Tensor | None = None

    @cached_property
    def ids(self) -> Tensor:
        """Token ids, int64 ``[T]``. Tokens in flight come in when they are first asked for; captured steps fetch their own."""
        if self.in_flight is None:
            return self.fed
        return torch.where(self.fed < 0, self.in_flight[(-1 - self.fed).clamp_min(0)], self.fed)

    @property
    def tokens(self) -> int:
        """Tokens of the step, ``T``."""
        return int(self.fed.shape[0])

    @property
    def sequences(self) -> int:
        """Sequences of the step, ``S``."""
        return int(self.query_start_host.shape[0]) - 1

    def part(self, first: int, last: int) -> StepBatch:
        """The sequences from ``first`` to before ``last`` as a step of their own, for attention: nobody's logits are wanted."""
        at, end = (int(self.query_start_host[place]) for place in (first, last))
        return StepBatch(
            fed=self.ids[at:end],
            positions=self.positions[at:end],
            query_start=self.query_start[first : last + 1] - at,
            sample_rows=self.sample_rows[:0],
            groups=tuple(group.part(slice(first, last), slice(at, end)) for group in self.groups),
            decode_only=end - at == last - first,
            query_start_host=self.query_start_host[first : last + 1] - at,
            spans=None if self.spans is None else self.spans[at:end],
        )

    # the common case of one group, under short names
    @property
    def slots(self) -> Tensor:
        """Slots of the first group."""
        return self.groups[0].slots

    @property
    def kv_lengths(self) -> Tensor:
        """KV lengths of the first group."""
        return self.groups[0].kv_lengths

    @property
    def block_tables(self) -> Tensor:
        """Block tables of the first group."""
        return self.groups[0].block_tables

    @property
    def block_tables_host(self) -> Tensor:
        """Block tables of the first group, on the host."""
        return self.groups[0].block_tables_host


class _Layout(NamedTuple):
    """Views of the buffers for a step's arrays, by kind, and the bytes that they take."""

    host: list[Tensor]
    arrays: list[NDArray[Any]]
    device: list[Tensor]
    total: int


class BatchBuilder:
    """Packs the arrays of a step into one reused host buffer (pinned for CUDA) and sends it in one copy to a reused one.

    A batch is overwritten by the next `build`: a step has to be over before the next one is built. Steps of equal shapes
    get the same tensors with other numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layouts: dict[tuple[int, tuple[tuple[int, ...], ...]], _Layout] = {}
        self._host = self._sent = torch.empty(0, dtype=torch.uint8)
        self._copied: Any = None
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            self._copied = event()

    def build(
        self,
        *,
        ids: Ints,
        positions: Ints,
        counts: Ints,
        sample_rows: Ints,
        groups: Sequence[GroupInputs],
        spans: Ints | None = None,
        images: ImageRows | None = None,
    ) -> StepBatch:
        """Build the batch of sequences that bring ``counts`` ``[S]`` tokens each."""
        starts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        wide: list[NDArray[Any]] = [ids, positions, sample_rows, *([] if spans is None else [spans])]
        own = len(wide)
        narrow: list[NDArray[Any]] = [starts]
        for group in groups:
            tables = group.block_tables
            wide.append(group.slots)
            narrow += [group.kv_lengths, group.dropped]
            if isinstance(tables, TableRows):
                places, blocks = tables.tables.changes()
                wide += [tables.rows, places]
                narrow.append(blocks)
            else:
                narrow.append(tables)
        host, device = self._send(wide, narrow)
        longs, ints, ints_host = (iter(part) for part in (device[own:], device[len(wide) + 1 :], host[len(wide) + 1 :]))
        parts = []
        picked: Tensor | GatheredRows
        for group in groups:
            tables, slots = group.block_tables, next(longs)
            lengths, dropped, last = (next(ints) for _ in range(3))
            lengths_host, dropped_host, last_host = (next(ints_host) for _ in range(3))
            if isinstance(tables, TableRows):
                rows = next(longs)
                tables.tables.update(next(longs), last)
                picked, read = tables.tables.pick(rows, tables.width), tables.read
            else:
                picked, read = last, last_host.numpy
            parts.append(GroupBatch(slots, lengths, picked, dropped, lengths_host, dropped_host, read, group.places))
        return StepBatch(
            fed=device[0],
            positions=device[1],
            sample_rows=device[2],
            query_start=device[len(wide)],
            groups=tuple(parts),
            decode_only=len(ids) == len(counts),
            query_start_host=host[len(wide)],
            spans=None if spans is None else device[3],
            images=images,
        )

    def _send(self, wide: Sequence[Ints], narrow: Sequence[NDArray[Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors on the host and on the device: int64 for ``wide``, int32 for ``narrow``."""
        shapes = tuple([array.shape for array in (*wide, *narrow)])
        layout = self._layouts.get((len(wide), shapes)) or self._lay_out(shapes, len(wide))
        if self._copied is not None:
            # the step before may be launched and not begun
            self._copied.synchronize()
        for target, array in zip(layout.arrays, (*wide, *narrow), strict=True):
            target[...] = array
        if self._sent is not self._host:
            self._sent[: layout.total].copy_(self._host[: layout.total], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return layout.host, layout.device

    def _lay_out(self, shapes: tuple[tuple[int, ...], ...], wide: int) -> _Layout:
        """Give every array its span, at multiples of 16 bytes: triton compiles a kernel anew for other addresses."""
        spans: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        at = 0
        for index, shape in enumerate(shapes):
            dtype = torch.int64 if index < wide else torch.int32
            size = dtype.itemsize * math.prod(shape)
            spans.append((at, at + size, dtype, shape))
            at += -(-size // _ALIGNED) * _ALIGNED
        if at > self._host.numel() or len(self._layouts) == _LAYOUTS:
            self._layouts.clear()
        if at > self._host.numel():
            pinned = self._device.type == "cuda"
            self._host = torch.empty(2 * at, dtype=torch.uint8, pin_memory=pinned)
            self._sent = self._host
            if self._device.type != "cpu":
                self._sent = torch.empty(2 * at, dtype=torch.uint8, device=self._device)
        host, device = (
            [raw[start:end].view(dtype).view(shape) for start, end, dtype, shape in spans]
            for raw in (self._host, self._sent)
        )
        layout = self._layouts[wide, shapes] = _Layout(host, [tensor.numpy() for tensor in host], device, at)
        return layout
