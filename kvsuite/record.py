"""Record: the result of one case, and what counts as a valid one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, get_args

from .case import Case
from .errors import UserError

RECORD_SCHEMA = "kvsuite.record/1"
RUN_SCHEMA = "kvsuite.run/1"
REPORT_SCHEMA = "kvsuite.report/1"

Status = Literal["ok", "oom", "error", "crashed", "invalid", "skipped"]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass
class Record:
    """One case's result, written the moment the case ends.

    ``metrics`` maps a metric name to the entry that `MetricRegistry.value` builds; ``memory`` holds the three
    columns predicted, reported (by the engine) and measured, in bytes; ``effective`` is what the runtime really applied,
    ``inert`` the requested axes that do not reach it, each with its reason. ``order_index`` is the place in which the case
    ran, ``case_index`` its place in the suite's space.
    """

    case: Case
    id: str
    case_key: str = ""
    settings_hash: str = ""
    status: Status = "ok"
    effective: dict[str, Any] = field(default_factory=dict)
    inert: dict[str, str] = field(default_factory=dict)
    partition: dict[str, Any] = field(default_factory=lambda: {"requested": None, "realised": None})
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, dict[str, Any]] = field(default_factory=lambda: {"predicted": {}, "reported": {}, "measured": {}})
    tokens: dict[str, int] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] | None = None
    rounds: int = 0
    warmup: int = 0
    order_index: int = 0
    order_seed: int = 0
    case_index: int = 0
    seed: int = 0
    started_utc: str = ""
    duration_s: float | None = None
    env: str = ""
    sidecar: str | None = None
    warnings: list[str] = field(default_factory=list)
    reason: str | None = None
    error: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types, in the field order of the schema."""
        row: dict[str, Any] = {
            "schema": RECORD_SCHEMA,
            "case_key": self.case_key,
            "settings_hash": self.settings_hash,
            "id": self.id,
            "suite": self.case.suite,
            "status": self.status,
            "case": self.case.to_dict(),
        }
        row |= {name: value for name, value in self.__dict__.items() if name not in row}
        return row


def schema(name: str) -> dict[str, Any]:
    """Load a JSON Schema shipped with the package: ``"record"``, ``"run"`` or ``"report"``."""
    text = resources.files("kvsuite.store").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def metric_value(row: dict[str, Any], name: str) -> float | None:
    """Headline value of metric ``name`` in a record row, ``None`` if the row has none."""
    from .metrics.registry import ALIASES

    entry = row.get("metrics", {}).get(ALIASES.get(name, name))
    value = None if entry is None else entry.get("value")
    return None if value is None else float(value)


def check_schema(found: object, wanted: str, where: str) -> None:
    """Refuse a document of another schema.

    Raises
    ------
    UserError
        Naming the file, the schema found and the mend.
    """
    if found != wanted:
        raise UserError(
            f"{where}: schema is {found!r}, this kvsuite reads {wanted!r}; "
            "redraw it with the kvsuite version that wrote it, or run the benchmark again"
        )
