"""The figures of all suites, which come in through the hook that everybody uses. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsuite.store.files import write_atomic
from kvsuite.suites.outputs import run_figures


def draw(run: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the figures of every suite that has a finished case; return their paths."""
    finished = {row["suite"] for row in rows if row["status"] == "ok"}
    drawn = run_figures(run, [row for row in rows if row["suite"] in finished])
    for name, content in drawn.items():
        write_atomic(folder / name, content)
    return [folder / name for name in drawn]
