"""Fixtures: a case, and what measures it. What they do is imported when a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.errors import UserError
from kvsuite.options.resolve import Options

from .stash import CASES, CLUSTER, OPTIONS, UNUSABLE

if TYPE_CHECKING:
    from kvsuite.case import Case
    from kvsuite.record import Record


@pytest.fixture(scope="session")
def kv_options(pytestconfig: pytest.Config) -> Options:
    """The resolved ``--kv-*`` options."""
    return pytestconfig.stash[OPTIONS]


@pytest.fixture
def kv_case(request: pytest.FixtureRequest) -> Case:
    """The case of this test; parametrised by the ``kv_suite`` marker."""
    if not hasattr(request, "param"):
        raise UserError(f"{request.node.nodeid}: kv_case needs the marker @pytest.mark.kv_suite('compression')")
    if str(request.param).startswith(UNUSABLE):
        pytest.fail(f"kvsuite: {str(request.param).removeprefix(UNUSABLE)}", pytrace=False)
    return request.config.stash[CASES][request.node.get_closest_marker("kv_suite").args[0], request.param]


@pytest.fixture(scope="session")
def kv_runner(pytestconfig: pytest.Config) -> Iterator[Any]:
    """The `kvsuite.measure.runner.CaseRunner` of this process; sessions are shared between the cases of one model."""
    from .measuring import open_runner
    from .run import begin

    # a test may ask for it by request.getfixturevalue alone
    begin(pytestconfig)
    if CLUSTER in pytestconfig.stash:
        yield pytestconfig.stash[CLUSTER]
    else:
        yield from open_runner(pytestconfig)


@pytest.fixture
def kv_run(request: pytest.FixtureRequest, kv_runner: Any) -> Callable[[Case], Record]:
    """Measure a case: returns its record, skips where it cannot run, fails where it failed. The record is kept either way."""
    from .measuring import measurer

    return measurer(request, kv_runner)
