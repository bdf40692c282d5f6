"""Small runs on disk, built with the real Case, Record and RecordStore."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from kvsuite.case import Case, digest
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.resolve import default_options
from kvsuite.record import Record
from kvsuite.store.store import open_run

REGISTRY = MetricRegistry()
STARTED = datetime(2026, 1, 1, 12)


def environment(**changes: Any) -> dict[str, Any]:
    host = {"name": "host", "os": "Linux", "cpu": "scripted", "cores": 2, "ram_bytes": 2**34}
    packages = {"torch": "2.13.0", "transformers": "5.23.0", "kvpress": None, "bitsandbytes": None, "triton": None}
    return {
        "host": host | changes.pop("host", {}),
        "packages": packages | changes.pop("packages", {}),
        "gpu": {},
        "command": ["pytest"],
    } | changes


def case(name: str, **changes: Any) -> Case:
    workload = {"protocol": "streaming-decode", "prompt_tokens": 16, "max_new_tokens": 4, "max_tokens": 257,
                "num_samples": 1, "corpus": "default", "batch": 1}  # fmt: skip
    fields: dict[str, Any] = {
        "suite": "compression", "engine": "hf", "model": "dummy:tiny", "device": "cpu", "dtype": "float32",
        "workload": workload, "params": {"group": "policy", "budget": None},
    }  # fmt: skip
    return Case(name=name, **fields | changes)


def node_id(one: Case) -> str:
    return f"benchmarks/test_{one.suite}.py::test_{one.suite}[{one.id}]"


def row(name: str, status: str = "ok", *, env: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    one = fields.pop("case", None) or case(name)
    record = Record(
        case=one, id=node_id(one), status=status, case_key=one.key(model_revision="r", dataset_revision=None),
        settings_hash=digest({}), model={"label": "dummy-tiny", "kind": "dummy", "revision": "dummy:tiny"},
        env=digest(env or environment()), started_utc=STARTED.isoformat(), duration_s=1.5,
        reason=None if status == "ok" else "a reason", rounds=5, warmup=2,
    )  # fmt: skip
    if status == "ok":
        record.metrics["kv_bytes_exact"] = REGISTRY.value("kv_bytes_exact", 1000)
    if status in ("oom", "error", "crashed"):
        record.error = {"type": "E", "message": "m", "phase": "decode", "traceback": None}
    return record.to_dict() | fields


def facts(**changes: Any) -> dict[str, Any]:
    options = default_options(**{"model": "dummy:tiny", "device": "cpu"} | changes.pop("options", {})).to_dict()
    return {
        "command": ["pytest"], "options": options, "environment": environment(), "seed": 0, "order_seed": 3, "cases": 3,
        "code": {"kvsuite": "sha256:aa", "benchmarks/test_compression.py": "sha256:bb"},
    } | changes  # fmt: skip


def store_run(base: Path, rows: Iterable[dict[str, Any]], **changes: Any) -> Path:
    """Write a run and return its folder."""
    with open_run(base, method="streaming_llm", model="tiny", started=STARTED, facts=facts(**changes)) as store:
        for one in rows:
            store.append(one)
    return store.folder
