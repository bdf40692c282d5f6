"""What the rows of the suite say, by the fields of their cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.reporting.aggregate import Row

#: before the numbers of a case whose task the full cache itself does not answer, and what it means
MARK = "~"
MARK_MEANING = (
    f"{MARK} not discriminative: the full cache itself answers too few exactly, or scores too low, so the case says nothing "
    "about its cache and is not ranked."
)


def cells_of(row: Row) -> Sequence[Mapping[str, Any]]:
    """Scores of a case by depth, empty where it has none."""
    return row.get("samples", {}).get("cells", ()) if row["status"] == "ok" else ()


def is_reuse(row: Row) -> bool:
    """Whether its contexts were asked by requests in turn."""
    return bool(row["case"]["workload"].get("task") == "reuse")


def is_discriminative(row: Row) -> bool:
    """Whether the full cache answers enough for the case to say something about its own cache."""
    metrics = row["metrics"]
    return all(metrics.get(name, {}).get("discriminative", True) for name in ("retrieval_exact", "task_score"))


def is_published(row: Row) -> bool:
    """Whether its task is somebody else's."""
    return "published" in row["case"]["workload"]
