"""What a controller and its workers tell each other. All of it can be pickled, and none of it knows pytest or Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kvsuite.case import Case, digest
from kvsuite.metrics import Metric
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.record import Record

#: a worker or process that has not begun after so many seconds waits for what another job holds, or hangs
BEGIN_S = 300.0


@dataclass(frozen=True)
class Setup:
    """What every worker of a run is told once.

    Parameters
    ----------
    options
        Resolved by the controller, which is where the user typed them.
    planned
        All cases of the run, in the order of their space.
    metrics
        Known metrics, those of the controller's hooks included.
    command
        What the user typed.
    folder
        The controller's working folder: relative paths are meant from there, where a node has it too.
    """

    options: Options
    planned: tuple[Case, ...]
    metrics: tuple[Metric, ...]
    command: tuple[str, ...]
    folder: str


@dataclass
class Order:
    """A case to be measured.

    Parameters
    ----------
    case, id, order_index
        As for `kvsuite.measure.runner.CaseRunner.run`.
    lost_on
        Nodes that died while they measured it.
    """

    case: Case
    id: str
    order_index: int
    lost_on: list[str] = field(default_factory=list)

    def record(self, options: Options, environment: dict[str, Any]) -> dict[str, Any]:
        """Row of the case before anything is known of it: what is left of one of which there is no black box."""
        common = options.of(CommonOptions)
        return Record(
            case=self.case, id=self.id, case_key=self.case.key(model_revision=None, dataset_revision=None),
            rounds=common.rounds, warmup=common.num_warmup, seed=common.seed, order_index=self.order_index,
            started_utc=datetime.now(UTC).isoformat(timespec="seconds"), env=digest(environment),
        ).to_dict()  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A host of the cluster.

    Parameters
    ----------
    id
        By which the cluster knows it; a host that comes back has another.
    name, ip
        Its own.
    slots
        Workers that it has room for.
    """

    id: str
    name: str
    ip: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name} ({self.ip}, {self.id[:8]})"

    def facts(self) -> dict[str, str]:
        """What a row says of it."""
        return {"name": self.name, "ip": self.ip, "id": self.id[:8]}


@dataclass(frozen=True)
class Ready:
    """A worker can begin.

    Parameters
    ----------
    environment
        Facts of its host, with GPU and engines.
    code
        Hashes of the code that measures there.
    memory_bytes
        Of its GPU, or of its host; ``None`` where that is not known.
    gpu
        Entry of ``CUDA_VISIBLE_DEVICES`` that it was given, ``None`` for a worker on cores.
    refusal
        Why nothing can be measured there, ``None`` if something can.
    unusable
        Engines of the run's cases that cannot be used there, with the device.
    """

    environment: dict[str, Any]
    code: dict[str, str]
    memory_bytes: int | None
    gpu: str | None
    refusal: str | None = None
    unusable: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class CaseAnswer:
    """What became of an `Order`.

    Parameters
    ----------
    record
        The row.
    tokens
        Columns of its sidecar.
    environment
        In which it was measured.
    usage_error
        Why the run cannot go on, in the place of a row.
    is_spent
        Whether the process that measured must not measure another.
    """

    record: dict[str, Any] | None
    tokens: dict[str, list[Any]] | None
    environment: dict[str, Any]
    usage_error: str | None = None
    is_spent: bool = False
