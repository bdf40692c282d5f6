"""Which machine a row was measured on, where several measured a run: their times are never those of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MEANING = "Machine: the node that measured the case. Times of two nodes are not set against each other, bytes and quality are."


def machine_of(row: Mapping[str, Any]) -> str:
    """``a (10.0.0.1)``; empty for a row of a run on one host, which needs no name."""
    node = row["effective"].get("node")
    return f"{node.get('name')} ({node.get('ip')})" if isinstance(node, Mapping) else ""


def has_several_machines(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether times of these rows belong to more than one machine."""
    return len(set(map(machine_of, rows))) > 1
