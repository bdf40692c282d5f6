"""What a run of pytest with cases imports of kvsuite: a run inside this process drops what it imported first."""

from __future__ import annotations

import importlib

_PLUGIN = ("reporter", "case_watch", "gate", "pytest_benchmark", "run", "selection", "measuring", "terminal")


def import_what_runs_import() -> None:
    """Import the plugin's parts and the suites, so that not every run inside this process imports some 130 modules anew."""
    for name in _PLUGIN:
        importlib.import_module(f"kvsuite.plugin.{name}")
    from kvsuite.suites.registry import suite_named, suite_names

    for name in suite_names():
        suite_named(name)
