"""What a step does on the device, without waiting for it, and what it leaves in the books."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from .block_table import BlockTables
from .counters import Counters
from .in_flight import TokensInFlight
from .kv_pool import KVPool
from .request import Request
from .runner import Runner
from .sampling import sample
from .scheduler import StepPlan
from .step_inputs import ScoredRows, StepInputs

OnRows = Callable[[Sequence[ScoredRows], Tensor], None]


class StepWatch(Protocol):
    """Times steps."""

    def begin(self) -> Any:
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
        for pool, copies in zip(self._pools, plan.copies, strict=True):
            pool.copy_blocks(copies)
        batch, sampled, scored = self._inputs.build(plan)
        observer = self._runner.observer
        if observer is not None:
            observer.begin(plan.requests)
        drawing = any(request.sampling.temperature for request in sampled)
        if before is not None:
            before.fill(batch.ids, plan.requests, batch.decode_only)
        begun = None if self.watch is None else self.watch.begin()
        if scored:
            states = self._runner.hidden(batch)
            if on_rows is not None:
                on_rows(scored, states[len(sampled) :])
            logits = self._runner.logits(states[: len(sampled)]) if sampled else states[:0]
        else:
            logits = self._runner.run(batch)
        if self.watch is not None:
            self.watch.end(begun, decode_only=batch.decode_only)
        if observer is not None:
            observer.end()
        self._counters.steps += 1
        self._counters.decode_steps += batch.decode_only
        if not sampled:
            return None, logits
        if drawing:
            chosen = sample(logits, [r.sampling for r in sampled], [r.output_length for r in sampled])
        else:
            chosen = logits.argmax(dim=-1)
        return TokensInFlight(sampled, chosen), logits

    def commit(self, plan: StepPlan) -> None:
        """Count the tokens whose keys a step stores."""
        rows, counts = np.array([request.row for request in plan.requests]), np.array(plan.counts)
        for table in self._tables:
            table.commit(rows, counts)
        decoded = 0
        for request, fed in zip(plan.requests, plan.counts, strict=True):
            if fed == 1 and request.computed >= request.prompt_length:
                decoded += 1
            request.computed += fed
            request.fed += fed
        self._counters.computed_decode_tokens += decoded
        self._counters.computed_prefill_tokens += sum(plan.counts) - decoded


def still_wanted(flight: TokensInFlight, logits: Tensor) -> tuple[list[Request], Tensor]:
    """The requests of a step that are not over, and their logits ``[n, vocab]``."""
    rows = [row for row, request in enumerate(flight.requests) if not request.status.over]
    if len(rows) == len(flight.requests):
        return flight.requests, logits
    return [flight.requests[row] for row in rows], logits[rows]
