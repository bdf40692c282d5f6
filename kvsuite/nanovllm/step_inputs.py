"""From a plan to the tensors of its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvsuite.models.image_reader import ImageReader

from .batch import BatchBuilder, GroupInputs, ImageRows, Ints, StepBatch
from .block_table import BlockTables
from .decode_eviction import DecodeEviction
from .device_tables import DeviceTables, TableRows
from .groups import LayerGroup
from .request import Request
from .scheduler import StepPlan


class ScoredRows(NamedTuple):
    """Hidden states of a request in one step: its scored tokens ``first .. first + rows - 1``, counted from 0."""

    request: Request
    first: int
    rows: int


class StepInputs:
    """Gathers tokens, positions and places in the cache of a step's requests.

    Parameters
    ----------
    groups, tables, evictions
        One of each per layer group.
    device
        Where the tensors go.
    spans
        Whether the model needs the tokens' spans (`StepBatch.spans`).
    keeps_tables
        Whether block tables stay on the device and steps bring what changed: cheap where many sequences come back in every
        step. Else every step brings the rows that it reads. One follower of the tables may keep them.
    images
        Makes features of the requests' images, ``None`` for a model that reads none.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        tables: Sequence[BlockTables],
        evictions: Sequence[DecodeEviction],
        device: torch.device,
        *,
        spans: bool = False,
        keeps_tables: bool = True,
        images: ImageReader | None = None,
    ) -> None:
        self._images = images
        self._device = device
        self._with_spans = spans
        self._parts = list(zip(groups, tables, evictions, strict=True))
        self._tables = tables
        self._places = any(group.places for group in groups)
        self._on_device = [DeviceTables(own, device) if keeps_tables else None for own in tables]
        self._builder = BatchBuilder(device)

    def build(self, plan: StepPlan) -> tuple[StepBatch, list[Request], list[ScoredRows]]:
        """The tensors of a planned step, the requests whose next token it gives, and the scored rows behind theirs."""
        requests, fed = plan.requests, plan.counts
        ids: list[int] = []
        computed: list[int] = []
        row_list: list[int] = []
        sampled: list[int] = []
        with_scored = with_images = False
        # the one walk over the requests: a step's host time is mostly such walks
        for index, (request, count) in enumerate(zip(requests, fed, strict=True)):
            tokens, at = request.tokens, request.computed
            computed.append(at)
            row_list.append(request.row)
            if count == 1:
                ids.append(tokens[at])
            else:
                ids += tokens[at : at + count]
            if request.images:
                with_images = True
            if request.scored:
                with_scored = True
            elif at + count == len(tokens):
                sampled.append(index)
        counts, rows = np.array(fed, dtype=np.int64), np.array(row_list, dtype=np.int64)
        starts = self._starts(computed, rows)
        if len(ids) == len(fed):
            positions, slots = starts, [table.next_slots(rows) for table in self._tables]
            wanted = np.array(sampled, dtype=np.int64)
        else:
            ends = np.cumsum(counts)
            positions = np.arange(len(ids)) + np.repeat(starts - (ends - counts), counts)
            slots = [
                np.concatenate([table.slots(row, count) for row, count in zip(row_list, fed, strict=True)])
                for table in self._tables
            ]
            wanted = ends[sampled] - 1
        scored: list[ScoredRows] = []
        if with_scored:
            scored, rows_of_scored = _scored(plan)
            wanted = np.concatenate([wanted, rows_of_scored])
        spans = None
        if self._with_spans:
            spans = np.maximum(positions + 1, np.repeat([request.together for request in requests], counts))
        images = self._image_rows(plan) if with_images else None
        batch = self._builder.build(
            ids=np.array(ids, dtype=np.int64),
            positions=positions,
            counts=counts,
            sample_rows=wanted,
            spans=spans,
            images=images,
            groups=[
                GroupInputs(
                    slots=own,
                    kv_lengths=table.lengths[rows] + counts,
                    block_tables=table.rows(rows) if on_device is None else TableRows(on_device, rows),
                    dropped=table.dropped[rows],
                    places=eviction.places(rows, fed) if group.places else (),
                )
                for own, on_device, (group, table, eviction) in zip(slots, self._on_device, self._parts, strict=True)
            ],
        )
        chosen = requests if len(sampled) == len(requests) else [requests[i] for i in sampled]
        return batch, chosen, scored

    def _image_rows(self, plan: StepPlan) -> ImageRows | None:
        """Features that stand in a step; those of a request are made when the first of them does."""
        assert self._images is not None
        rows: list[Ints] = []
        features: list[Tensor] = []
        begin = 0
        for request, count in zip(plan.requests, plan.counts, strict=True):
            first, last = request.image_rows(request.computed, request.computed + count)
            if first < last:
                if request.features is None:
                    request.features = torch.cat([self._images.features(image) for image in request.images])
                rows.append(request.image_places[first:last] - request.computed + begin)
                features.append(request.features[first:last])
            begin += count
        if not rows:
            return None
        places = torch.from_numpy(np.concatenate(rows))
        if self._device.type == "cuda":
            places = places.pin_memory().to(self._device, non_blocking=True)
        return ImageRows(places, torch.cat(features))

    def _starts(self, computed: Sequence[int], rows: Ints) -> Ints:
        """Position id of every sequence's next token: its logical one, or its place in the cache."""
        if not self._places:
            return np.array(computed, dtype=np.int64)
        # blocks that a window freed count: its layers keep rotated keys
        starts: Ints = np.max([table.lengths[rows] + table.dropped[rows] for table in self._tables], axis=0)
        return starts


def _scored(plan: StepPlan) -> tuple[list[ScoredRows], Ints]:
    """What a step computes of scored tokens, and the rows of the step that hold it."""
    found: list[ScoredRows] = []
    rows: list[Ints] = []
    start = 0
    for request, count in zip(plan.requests, plan.counts, strict=True):
        begin = request.prompt_length - request.scored
        first = max(begin - request.computed, 0)
        if request.scored and first < count:
            found.append(ScoredRows(request, request.computed + first - begin, count - first))
            rows.append(np.arange(start + first, start + count))
        start += count
    return found, np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
