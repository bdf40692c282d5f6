"""Benchmarks need the kvsuite plugin; without it they skip with the reason."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config, items):
    # loaded by its entry point, or by `-p kvsuite.plugin` where entry points are off
    if any(config.pluginmanager.hasplugin(name) for name in ("kvsuite", "kvsuite.plugin")):
        return
    skip = pytest.mark.skip(reason="the kvsuite plugin is off: pip install -e . and drop -p no:kvsuite")
    for item in items:
        if item.get_closest_marker("kv_suite"):
            item.add_marker(skip)
