"""What a step does on the device, without waiting for it, and what it leaves in the books."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .batch import StepBatch
from .block_table import BlockTables
from .counters import Counters
from .in_flight import TokensInFlight
from .kv_pool import KVPool
from .request import Request
from .runner import Runner
from .sampling import greedy, sample
from .scheduler import StepPlan
from .step_inputs import ScoredRows, StepInputs

OnRows = Callable[[Sequence[ScoredRows], Tensor], None]


@dataclass(frozen=True)
class Prepared:
    """A step whose tensors are on their way to the device."""

    batch: StepBatch
    sampled: list[Request]
    scored: list[ScoredRows]


class StepWatch(Protocol):
    """Times steps."""

    def begin(self, *, decode_only: bool) -> Any:
        """Its forward pass begins on the current stream."""

    def end(self, begun: Any, *, decode_only: bool) -> None:
        """Its forward pass is launched."""


class StepLauncher:
    """Launches steps and counts them.

    Parameters
    ----------
    runner
        Runs the model.
    inputs
        Makes the tensors of a step.
    pools, tables
        One of each per layer group.
    counters
        Kept up to date.
    """

    def __init__(
        self,
        runner: Runner,
        inputs: StepInputs,
        pools: Sequence[KVPool],
        tables: Sequence[BlockTables],
        counters: Counters,
    ) -> None:
        self._runner = runner
        self._inputs = inputs
        self._pools = pools
        self._tables = tables
        self._counters = counters
        #: times steps
        self.watch: StepWatch | None = None

    def launch(
        self, plan: StepPlan, before: TokensInFlight | None, on_rows: OnRows | None = None
    ) -> tuple[TokensInFlight | None, Tensor]:
        """Start a step; return the tokens that it will give, if any, and its logits ``[R, vocab]``.

        Parameters
        ----------
        plan
            The step.
        before
            Tokens of the step before that the host has yet to see.
        on_rows
            Sees the hidden states of scored tokens.
        """
        return self.compute(self.prepare(plan, before), on_rows)

    def prepare(self, plan: StepPlan, before: TokensInFlight | None) -> Prepared:
        """The first part of `launch`, which reads the books: all but the forward pass."""
        for pool, copies in zip(self._pools, plan.copies, strict=True):
            pool.copy_blocks(copies)
        batch, sampled, scored = self._inputs.build(plan)
        if self._runner.observer is not None:
            self._runner.observer.begin(plan.requests)
        if before is not None:
            batch = before.into(batch, sampled)
        return Prepared(batch, sampled, scored)

    def compute(self, step: Prepared, on_rows: OnRows | None = None) -> tuple[TokensInFlight | None, Tensor]:
        """The second part of `launch`, which leaves the books alone: another thread may do it."""
        batch, sampled = step.batch, step.sampled
        drawing = any(request.sampling.temperature for request in sampled)
        begun = None if self.watch is None else self.watch.begin(decode_only=batch.decode_only)
        if step.scored:
            states = self._runner.hidden(batch)
            if on_rows is not None:
                on_rows(step.scored, states[len(sampled) :])
            logits = self._runner.logits(states[: len(sampled)]) if sampled else states[:0]
        else:
            logits = self._runner.run(batch)
        if self.watch is not None:
            self.watch.end(begun, decode_only=batch.decode_only)
        if self._runner.observer is not None:
            self._runner.observer.end()
        if not sampled:
            return None, logits
        if drawing:
            parameters, drawn = [r.sampling for r in sampled], [r.output_length for r in sampled]
            chosen = sample(logits, parameters, drawn, self._arrivals)
        else:
            chosen = greedy(logits, self._arrivals)
        return TokensInFlight(sampled, chosen), logits

    @cached_property
    def _arrivals(self) -> Tensor:
        """Zeros for `sampling.greedy`, a row for each sequence of a step at most; made on the stream of the steps."""
        return torch.zeros(len(self._tables[0].lengths), dtype=torch.int32, device=self._pools[0].device)

    def commit(self, plan: StepPlan) -> None:
        """Count a step, and the tokens whose keys it stores."""
        rows, counts = np.array([request.row for request in plan.requests]), np.array(plan.counts)
        for table in self._tables:
            table.commit(rows, counts)
        decoded = 0
        for request, count in zip(plan.requests, plan.counts, strict=True):
            if count == 1 and request.computed >= request.prompt_length:
                decoded += 1
            request.computed += count
            request.fed += count
        fed = sum(plan.counts)
        self._counters.steps += 1
        self._counters.decode_steps += fed == len(plan.counts)
        self._counters.computed_decode_tokens += decoded
        self._counters.computed_prefill_tokens += fed - decoded


def still_wanted(flight: TokensInFlight, logits: Tensor) -> tuple[list[Request], Tensor]:
    """The requests of a step that are not over, and their logits ``[n, vocab]``."""
    rows = [row for row, request in enumerate(flight.requests) if not request.status.over]
    if len(rows) == len(flight.requests):
        return flight.requests, logits
    return [flight.requests[row] for row in rows], logits[rows]
