"""Our own metrics and figures: they come in through the hooks that everybody uses. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from .metrics import BUILTIN, Metric


def pytest_kvsuite_metrics(config: pytest.Config) -> Iterable[Metric]:
    return BUILTIN


def pytest_kvsuite_figures(run: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Iterable[Path]:
    drawn: list[Path] = []
    if any(row["suite"] == "compression" and row["status"] == "ok" for row in rows):
        from .reporting.figures.compression import draw_benchmark_comparison

        drawn += draw_benchmark_comparison(run, rows, folder)
    from .reporting.perplexity_csv import csv_rows

    if results := csv_rows(run, rows):
        from .reporting.figures.perplexity import draw_perplexity

        drawn += draw_perplexity(results, folder)
    if any(row["suite"] == "dse" and row["status"] == "ok" for row in rows):
        from .reporting.dse_files import dse_sheets
        from .reporting.figures.dse import render_dse
        from .reporting.files import write_atomic

        for name, content in render_dse(dse_sheets(run, rows)).files.items():
            write_atomic(folder / name, content)
            drawn.append(folder / name)
    return drawn
