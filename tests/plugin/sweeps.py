"""A sweep of many short cases, and what of its report must not depend on what happened to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_runs import NO_FIGURES, TINY, copy_benchmarks

MANY = (
    *TINY, "--kv-method=streaming_llm,fix_size_l2,l2_compress", "--kv-fix-kv-sizes=6,8", "--kv-keep-ratios=0.5",
    "--kv-prune-after=4", "-p", "no:cacheprovider", "-p", "no:benchmark",
    # what they load takes longer than a case
    "-p", "no:hypothesispytest", "-p", "no:anyio",
)  # fmt: skip
#: what every run may have its own of
_OWN = (
    "started_utc",
    "duration_s",
    "env",
    "order_seed",
    "order_index",
    "warnings",
    "samples",
    "metrics",
    "effective",
    "model",
)
_REPEATABLE = ("deterministic", "near_deterministic")


def project(folder: Path, conftest: str = "") -> Path:
    """A folder to run pytest in; its runs draw nothing."""
    return copy_benchmarks(folder, conftest=NO_FIGURES + conftest)


def facts(folder: Path) -> dict[str, Any]:
    """What of a run's report has to be the same whatever happened, by case id."""
    report = json.loads((folder / "report.json").read_text())
    found = {}
    for row in report["records"]:
        kept = {name: value for name, value in row.items() if name not in _OWN}
        kept["metrics"] = {
            name: entry.get("value") for name, entry in row["metrics"].items() if entry["class"] in _REPEATABLE
        }
        found[row["id"]] = kept
    assert len(found) == len(report["records"])
    return found
