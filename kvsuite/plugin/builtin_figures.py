"""Our own figures, which come in through the hook that everybody uses. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(run: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the figures of every suite that has rows; return their paths."""
    drawn: list[Path] = []
    if any(row["suite"] == "compression" and row["status"] == "ok" for row in rows):
        from kvsuite.suites.compression.figure import draw_benchmark_comparison

        drawn += draw_benchmark_comparison(run, rows, folder)
    from kvsuite.suites.perplexity.csv_files import csv_rows

    if results := csv_rows(run, rows):
        from kvsuite.suites.perplexity.figure import draw_perplexity

        drawn += draw_perplexity(results, folder)
    if any(row["suite"] == "dse" and row["status"] == "ok" for row in rows):
        from kvsuite.store.files import write_atomic
        from kvsuite.suites.dse.figures.draw import render_dse
        from kvsuite.suites.dse.files import dse_sheets

        for name, content in render_dse(dse_sheets(run, rows)).files.items():
            write_atomic(folder / name, content)
            drawn.append(folder / name)
    return drawn
