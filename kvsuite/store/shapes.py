"""The record schema once more, as types that msgspec checks in microseconds.

JSON Schema decides what a record may be and says what is wrong with one, in 6 ms a record. These types accept nothing that the
schema refuses (a test draws records and compares the two), so that a record they accept needs no second look.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class _Case(msgspec.Struct):
    suite: Text
    engine: Text
    model: Text
    name: Text
    device: Text
    dtype: Text
    quantization: str | None
    policy: str | None
    policy_params: dict[str, Any]
    workload: dict[str, Any]
    params: dict[str, Any]
    partition: dict[str, Any] | None


class _Metric(msgspec.Struct, rename={"kind": "class"}):
    value: float | None
    unit: Text
    better: Literal["lower", "higher", "none"]
    kind: Literal["deterministic", "near_deterministic", "timed", "ambient"]
    version: Positive
    formula: Text
    reason: str | None = None
    n: Positive | UnsetType = UNSET
    mean: float | UnsetType = UNSET
    median: float | UnsetType = UNSET
    min: float | UnsetType = UNSET
    max: float | UnsetType = UNSET
    std: float | None = None
    cv: float | None = None
    se: float | None = None
    ci95: tuple[float, float] | None = None
    values: list[float] = []

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("no value and no reason")


class _Memory(msgspec.Struct):
    predicted: dict[str, Any]
    reported: dict[str, Any]
    measured: dict[str, Any]


class _ScoredText(msgspec.Struct):
    nll_sum: float
    tokens: Count
    correct: Count
    index: Count | UnsetType = UNSET
    chars: Count | UnsetType = UNSET
    sha256: str | UnsetType = UNSET


class _Samples(msgspec.Struct):
    rounds: list[dict[str, Any]] = []
    texts: list[_ScoredText] = []


class _Partition(msgspec.Struct):
    requested: Any
    realised: Any


class _Error(msgspec.Struct):
    type: str
    message: str
    traceback: str | None = None


class RecordShape(msgspec.Struct):
    """``record.schema.json``; unknown fields are allowed."""

    schema: Literal["kvsuite.record/1"]
    case_key: str
    settings_hash: str
    id: Text
    suite: Text
    status: Literal["ok", "oom", "error", "crashed", "invalid", "skipped"]
    case: _Case
    effective: dict[str, Any]
    inert: dict[str, str]
    partition: _Partition
    metrics: dict[str, _Metric]
    memory: _Memory
    tokens: dict[str, int]
    samples: _Samples
    model: dict[str, Any]
    dataset: dict[str, Any] | None
    rounds: Count
    warmup: Count
    order_index: Count
    seed: int
    started_utc: str
    duration_s: Annotated[float, Meta(ge=0)] | None
    env: str
    sidecar: str | None
    warnings: list[str]
    reason: str | None
    error: _Error | None
    case_index: Count | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.status in ("invalid", "skipped") and not self.reason:
            raise ValueError("no reason")


def is_record(document: object) -> bool:
    """Whether a document is a record beyond doubt; of one that is not, the schema has the last word."""
    try:
        msgspec.convert(document, RecordShape)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError):
        return False
    return True
