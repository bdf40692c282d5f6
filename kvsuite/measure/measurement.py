"""Measurement: what was found of a case. It becomes a record in one place, the runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvsuite.metrics.registry import MetricRegistry


@dataclass
class Measurement:
    """What passes found so far; what was found before a failure is kept.

    Parameters
    ----------
    registry
        Known metrics.
    metrics
        By name, as `MetricRegistry.value` builds them.
    memory
        Bytes ``predicted``, ``reported`` by the engine and ``measured``.
    tokens
        Counts of tokens.
    samples
        Raw numbers by what they are of: ``rounds``, ``texts``, …
    sidecar
        Per-token rows by column, for a file beside the records.
    warnings
        What a reader must know.
    inert
        Axes of the case that changed nothing, each with the reason.
    dataset, dataset_revision
        Facts of the scored text, and its hash: part of the case's key once the text was scored.
    """

    registry: MetricRegistry
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=lambda: {"predicted": {}, "reported": {}, "measured": {}})
    tokens: dict[str, int] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    sidecar: dict[str, list[Any]] | None = None
    warnings: list[str] = field(default_factory=list)
    inert: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, Any] | None = None
    dataset_revision: str | None = None

    def put(self, name: str, samples: Any, **facts: Any) -> None:
        """Keep metric ``name``: a number, the samples of all rounds, or ``None`` with ``reason=`` for what is not known.

        Raises
        ------
        UserError
            If no such metric is defined.
        """
        self.metrics[name] = self.registry.value(name, samples, **facts)
