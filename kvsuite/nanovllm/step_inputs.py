"""From a plan to the tensors of its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .batch import BatchBuilder, GroupInputs, Ints, StepBatch
from .block_table import BlockTables
from .eviction import Eviction
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
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        tables: Sequence[BlockTables],
        evictions: Sequence[Eviction],
        device: torch.device,
    ) -> None:
        self._parts = list(zip(groups, tables, evictions, strict=True))
        self._tables = tables
        self._places = any(group.places for group in groups)
        self._builder = BatchBuilder(device)

    def build(self, plan: StepPlan) -> tuple[StepBatch, list[Request], list[ScoredRows]]:
        """The tensors of a planned step, the requests whose next token it gives, and the scored rows behind theirs."""
        requests = plan.requests
        counts = np.array(plan.counts, dtype=np.int64)
        rows = np.array([request.row for request in requests], dtype=np.int64)
        starts = self._starts(requests, rows)
        if len(counts) == int(counts.sum()):
            ids = np.array([request.tokens[request.computed] for request in requests], dtype=np.int64)
            positions = starts
            slots = [table.next_slots(rows) for table in self._tables]
        else:
            fed = [r.tokens[r.computed : r.computed + n] for r, n in zip(requests, plan.counts, strict=True)]
            ids = np.concatenate([np.array(tokens, dtype=np.int64) for tokens in fed])
            offsets = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
            positions = np.repeat(starts, counts) + offsets
            slots = [
                np.concatenate([table.slots(row, n) for row, n in zip(rows.tolist(), plan.counts, strict=True)])
                for table in self._tables
            ]
        # a scored request never gets a token: -1 is no number of computed ones
        last = np.array([-1 if request.scored else len(request.tokens) for request in requests])
        sampled = np.flatnonzero(np.array([request.computed for request in requests]) + counts == last)
        wanted = (np.cumsum(counts) - 1)[sampled]
        scored: list[ScoredRows] = []
        if last.min() < 0:
            scored, rows_of_scored = _scored(plan)
            wanted = np.concatenate([wanted, rows_of_scored])
        batch = self._builder.build(
            ids=ids,
            positions=positions,
            counts=counts,
            sample_rows=wanted,
            groups=[
                GroupInputs(
                    slots=own,
                    kv_lengths=table.lengths[rows] + counts,
                    block_tables=table.table[:, : int(table.blocks[rows].max())][rows],
                    dropped=table.dropped[rows],
                    places=[eviction.ranks(r.row, n) for r, n in zip(requests, plan.counts, strict=True)]
                    if group.places
                    else (),
                )
                for own, (group, table, eviction) in zip(slots, self._parts, strict=True)
            ],
        )
        return batch, [requests[i] for i in sampled.tolist()], scored

    def _starts(self, requests: Sequence[Request], rows: Ints) -> Ints:
        """Position id of every sequence's next token: its logical one, or its place in the cache."""
        if not self._places:
            return np.array([request.computed for request in requests], dtype=np.int64)
        starts: Ints = np.max([table.lengths[rows] for table in self._tables], axis=0)
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
