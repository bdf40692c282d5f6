"""Our own metrics, and the figures of all suites: they come in through the hooks that everybody uses. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from kvsuite.metrics import BUILTIN, Metric
from kvsuite.metrics.installed import installed_metrics


def pytest_kvsuite_metrics(config: pytest.Config) -> Iterable[Metric]:
    return (*BUILTIN, *installed_metrics())


def pytest_kvsuite_figures(run: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Iterable[Path]:
    from kvsuite.store.files import write_atomic
    from kvsuite.suites.outputs import run_figures

    finished = {row["suite"] for row in rows if row["status"] == "ok"}
    drawn = run_figures(run, [row for row in rows if row["suite"] in finished])
    for name, content in drawn.items():
        write_atomic(folder / name, content)
    return [folder / name for name in drawn]
