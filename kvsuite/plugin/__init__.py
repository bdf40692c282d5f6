"""The pytest plugin: the half that is always there. It registers options, hooks and fixtures, and imports nothing else.

The other half, `kvsuite.plugin.run`, comes in when a test asks for a case, an option is given, a comparison is asked for, or
xdist controls workers, so that tests which have nothing to do with kvsuite pay for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite import __version__
from kvsuite.entry_points import warn
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.misspelt import misspelt_options, misspelt_variables
from kvsuite.options.resolve import Options, add_options, resolve_options

from . import hookspec
from .fixtures import kv_case, kv_options, kv_run, kv_runner
from .stash import CASES, OPTIONS, RESUMED, is_worker

if TYPE_CHECKING:
    from kvsuite.metrics import Metric

# fixtures stand in a file of their own: pytest finds them by name in this module
__all__ = ["kv_case", "kv_options", "kv_run", "kv_runner"]

_MARKERS = ("kv_suite(name): a kvsuite benchmark; its cases come from the suite's space",)
_FIXTURES = frozenset({"kv_case", "kv_run", "kv_runner"})


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(hookspec)


def pytest_addoption(parser: pytest.Parser) -> None:
    try:
        add_options(parser)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_load_initial_conftests(parser: pytest.Parser, args: list[str]) -> None:
    # what pytest shows below an argument that it does not know
    parser.extra_info |= {
        f"kvsuite {line.partition(':')[0]}": line.partition(": ")[2] for line in misspelt_options(args)
    }


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    try:
        options = config.stash[OPTIONS] = _resolve(config)
        config.stash[CASES] = {}
        compares = config.getoption("benchmark_compare", default=None)
        controls = not is_worker(config) and config.getoption("dist", default="no") != "no"
        if options.given or compares or controls:
            from .run import begin

            begin(config)
    except UserError as error:
        raise pytest.UsageError(f"kvsuite: {error}") from error
    if not is_worker(config):
        for line in misspelt_variables(os.environ):
            warn(line)


def pytest_report_header(config: pytest.Config) -> list[str]:
    resumed = config.stash.get(RESUMED, None)
    return [f"kvsuite: {__version__}", *([f"kvsuite: {resumed}"] if resumed else [])]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    # -n auto of a sweep on GPUs; anything else is xdist's to answer
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    try:
        options = _resolve(config)
        if not options.given:
            return None
        from kvsuite.distribution.gpus import gpus_for

        gpus = gpus_for(options.of(CommonOptions).device)
    except UserError:
        return None  # pytest_configure says what is wrong
    return len(gpus.entries) or None if gpus is not None else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _FIXTURES.isdisjoint(metafunc.fixturenames):
        return
    from .run import begin, parametrize

    try:
        begin(metafunc.config)
        parametrize(metafunc)
    except UserError as error:
        # of what is raised while pytest collects, this alone is shown without a trace
        raise pytest.Collector.CollectError(f"kvsuite: {error}") from error


def pytest_kvsuite_metrics(config: pytest.Config) -> Iterable[Metric]:
    from kvsuite.metrics import BUILTIN
    from kvsuite.metrics.installed import installed_metrics

    return (*BUILTIN, *installed_metrics())


def pytest_kvsuite_figures(run: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Iterable[Path]:
    from .suite_figures import draw

    return draw(run, rows, folder)


def _resolve(config: pytest.Config) -> Options:
    return resolve_options(lambda dest: config.getoption(dest, default=None), config.getini)
