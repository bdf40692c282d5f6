"""Whether anything that is selected can run here, found out before a folder is made or a worker started."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kvsuite.case import Case
from kvsuite.engines.registry import get_engine
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.suites.registry import usable_cases, usable_suites

from .stash import OPTIONS, is_worker


def require_known_runnable(config: pytest.Config) -> None:
    """Before anything is collected: refuse a device or an engine that was asked for and that no case of any suite can use.

    Raises
    ------
    UserError
        With every reason whole.
    """
    options = config.stash[OPTIONS]
    if options.given & {"device", "engine"}:
        require_runnable(config, (case for suite in usable_suites() for case in usable_cases(suite.name, options)))


def require_runnable(config: pytest.Config, cases: Iterable[Case]) -> None:
    """Refuse cases of which none can run here: they would become a folder of rows that all say the same.

    Raises
    ------
    UserError
        With every reason whole.
    """
    options = config.stash[OPTIONS]
    if is_worker(config) or config.option.collectonly or options.of(SweepOptions).plan or not _may_lack(options):
        return
    reasons = []
    for engine, device in dict.fromkeys((case.engine, case.device) for case in cases):
        reason = get_engine(engine, options).unavailable(device)
        if reason is None:
            return
        reasons.append(reason)
    if reasons:
        raise UserError(f"no selected case can run here: {'; '.join(dict.fromkeys(reasons))}")


def _may_lack(options: Options) -> bool:
    """Whether it is worth asking: the usual engines are there, and so is a CPU, whose torch need not be loaded."""
    if options.of(SweepOptions).cluster is not None:
        return False  # nodes are asked, and refused one by one
    return "engine" in options.given or resolve_device(options.of(CommonOptions).device) != "cpu"
