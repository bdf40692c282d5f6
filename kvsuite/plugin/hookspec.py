"""Hooks of the plugin. kvsuite's own metrics, figures and facts come in through the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kvsuite.engines.engine import Session
    from kvsuite.metrics.registry import Metric
    from kvsuite.record import Record
    from kvsuite.suites.suite import Suite


@pytest.hookspec
def pytest_kvsuite_metrics(config: pytest.Config) -> Iterable[Metric]:
    """Define metrics that records may hold.

    Example::

        def pytest_kvsuite_metrics(config):
            return [Metric("joules_per_token", "J", "lower", "timed", "energy of the decode phase / generated tokens")]
    """
    raise NotImplementedError


@pytest.hookspec
def pytest_kvsuite_suites(config: pytest.Config) -> Iterable[Suite | type[Suite]]:
    """Define suites, which have no options of their own; packages use the entry-point group ``kvsuite.suites``.

    Example::

        def pytest_kvsuite_suites(config):
            return [MySuite]
    """
    raise NotImplementedError


@pytest.hookspec
def pytest_kvsuite_update_record(config: pytest.Config, record: Record, session: Session | None) -> None:
    """Change or extend ``record`` right after its case was measured, in the process that measured it.

    ``session`` is the loaded engine, ``None`` if loading failed. On a cluster (``--kv-cluster``) this runs in the controller,
    where no engine is.

    Example::

        def pytest_kvsuite_update_record(config, record, session):
            record.metrics["joules_per_token"] = registry.value("joules_per_token", read_meter())
    """
    raise NotImplementedError


@pytest.hookspec
def pytest_kvsuite_update_env(config: pytest.Config, environment: dict[str, Any]) -> None:
    """Add facts to the environment, which is captured once a process.

    Example::

        def pytest_kvsuite_update_env(config, environment):
            environment["rack"] = "b12"
    """
    raise NotImplementedError


@pytest.hookspec
def pytest_kvsuite_update_report(config: pytest.Config, run: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Change the run facts or the record rows before the derived files are written; records.jsonl stays as it is."""
    raise NotImplementedError


@pytest.hookspec
def pytest_kvsuite_figures(
    config: pytest.Config, run: dict[str, Any], rows: list[dict[str, Any]], folder: Path
) -> Iterable[Path]:
    """Draw figures from the rows into ``folder`` and return their paths.

    Example::

        def pytest_kvsuite_figures(config, run, rows, folder):
            path = folder / "my_plot.png"
            draw(rows).savefig(path)
            return [path]
    """
    raise NotImplementedError
