"""The controller's side of a cluster: gives collected cases to workers, and runs the test of each when its row has come."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.skipping import evaluate_skip_marks

from kvsuite.case import Case
from kvsuite.distribution.gpus import gpus_for
from kvsuite.distribution.run_status import RunStatus, clear_status, write_status
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.sweep import SweepOptions

from .arrived_rows import ArrivedRows
from .case_watch import case_of
from .reporter import Reporter
from .stash import CLUSTER, OPTIONS, PLACES, PLANNED, RUNNER, SIGNALS

if TYPE_CHECKING:
    from kvsuite.cluster.dispatch import Dispatch
    from kvsuite.cluster.orders import Order, Setup
    from kvsuite.suites.footprint import Footprint

#: seconds between two lines about the whole
_TELL_S = 10.0
#: and between two writings of what the command status shows
_STATUS_S = 2.0


class ClusterController:
    """A plugin of the controller of a cluster: runs the tests.

    Parameters
    ----------
    config
        pytest's configuration.
    reporter
        Writes the rows.

    Raises
    ------
    UserError
        If Ray is not installed, or other options exclude it.
    """

    def __init__(self, config: pytest.Config, reporter: Reporter) -> None:
        from kvsuite.cluster.ray_cluster import require_ray

        from .measuring import update_environment

        self._config, self._reporter = config, reporter
        self._options = config.stash[OPTIONS]
        self._sweep = self._options.of(SweepOptions)
        self._device = self._options.of(CommonOptions).device
        assert self._sweep.cluster is not None
        self._address = self._sweep.cluster
        if config.getoption("dist", default="no") != "no":
            raise UserError(
                f"--kv-cluster={self._address}: its workers are Ray's, and -n starts xdist's; leave -n out"
                " (--kv-cluster-cores says how many workers a host without GPUs has)"
            )
        if ":" in self._device:
            raise UserError(
                f"--kv-device={self._device}: names one GPU, and workers of a cluster have one each; give --kv-device="
                f"{self._device.partition(':')[0]}"
            )
        if not config.option.collectonly:
            require_ray(self._address)
        self._gpus = gpus_for(self._device)
        if self._gpus is not None and self._sweep.cluster_cores is not None:
            raise UserError(
                f"--kv-cluster-cores={self._sweep.cluster_cores}: workers with a GPU each share the cores of their node; "
                "leave it out, or give --kv-device=cpu"
            )
        self.rows = config.stash[CLUSTER] = config.stash[RUNNER] = ArrivedRows(
            partial(update_environment, config), self._gpus
        )
        self._told = self._wrote = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Other tests first, here; then each case's test when its row is there."""
        cases = {item.nodeid: item for item in session.items if case_of(self._config, item) is not None}
        if not cases or self._config.option.collectonly:
            return None
        if session.testsfailed and not self._config.option.continue_on_collection_errors:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        # a test that skips itself is measured nowhere
        given = {name: item for name, item in cases.items() if evaluate_skip_marks(item) is None}
        for item in session.items:
            if item.nodeid not in given:
                self._run(item, None if item is session.items[-1] and not given else session)
        if given:
            try:
                self._measure(session, given)
            except UserError as error:
                pytest.exit(f"kvsuite: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
        return True

    def _measure(self, session: pytest.Session, items: Mapping[str, pytest.Item]) -> None:
        from kvsuite.cluster.dispatch import Dispatch
        from kvsuite.cluster.installed import require_installed
        from kvsuite.cluster.orders import Order
        from kvsuite.cluster.ray_cluster import RayCluster
        from kvsuite.cluster.reference import of_controller, of_earlier
        from kvsuite.measure.source_hash import others_code, source_hash

        places = self._config.stash[PLACES]
        orders = [Order(self._case(item), name, places.get(name, 0)) for name, item in items.items()]
        require_installed((order.case for order in orders), self._address)
        self._reporter.tell(f"kvsuite: --kv-cluster={self._address}: connecting")
        cluster = RayCluster(
            self._address,
            self._setup(),
            gpus=None if self._gpus is None else len(self._gpus.entries),
            cores=self._sweep.cluster_cores,
        )
        try:
            code = {"kvsuite": source_hash()} | others_code(order.case for order in orders)
            earlier = self._reporter.earlier
            dispatch = Dispatch(
                cluster, orders, self._options, code, self._footprints(orders), self._reporter.tell,
                reference=of_controller() if earlier is None else of_earlier(earlier.run),
            )  # fmt: skip
            for finished in dispatch.rows(lambda: self._beat(dispatch)):
                self.rows.arrive(finished)
                self._run(items[finished.order.id], session if dispatch.left else None)
        finally:
            with self._config.stash[SIGNALS].held():
                cluster.close()

    def _run(self, item: pytest.Item, following: pytest.Item | pytest.Session | None) -> None:
        """Run a test by pytest's own protocol.

        Parameters
        ----------
        item
            The test.
        following
            ``None`` after the last; the session where it is not known which test comes next, so that fixtures of the session
            stay and those of modules and classes go.
        """
        self._config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        session = item.session
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    def _case(self, item: pytest.Item) -> Case:
        case = case_of(self._config, item)
        assert case is not None
        return case

    def _setup(self) -> Setup:
        from kvsuite.cluster.orders import Setup

        hook = self._config.hook.pytest_kvsuite_metrics
        metrics = {metric.name: metric for given in hook(config=self._config) for metric in given}
        planned = self._config.stash[PLANNED]
        return Setup(self._options, tuple(planned), tuple(metrics.values()), tuple(sys.argv), str(Path.cwd()))

    def _footprints(self, orders: list[Order]) -> dict[str, Footprint]:
        from kvsuite.distribution.cost import footprint_of

        found = {}
        for order in orders:
            try:
                found[order.id] = footprint_of(order.case, self._options)
            except Exception:  # an estimate ends no run: the suite may be somebody else's
                continue
        return found

    # what is seen while it runs

    def _beat(self, dispatch: Dispatch) -> None:
        self._config.stash[SIGNALS].check()
        now = time.monotonic()
        self._reporter.note_workers(max(dispatch.workers, 1))
        if now - self._wrote >= _STATUS_S:
            self._wrote = now
            self._write_status(dispatch)
        # before the first worker too: one may take minutes to start
        if now - self._told >= _TELL_S:
            self._told = now
            self._reporter.tell(f"kvsuite: {self._status(dispatch).line()}")

    def _status(self, dispatch: Dispatch) -> RunStatus:
        return RunStatus(
            counts=dict(self._reporter.counts()),
            left=dispatch.left,
            running=dict(dispatch.running),
            starting=dispatch.starting,
            seconds_left=self._reporter.seconds_left,
        )

    def _write_status(self, dispatch: Dispatch) -> None:
        if self._reporter.folder is not None:
            write_status(self._reporter.folder, self._status(dispatch))

    def pytest_sessionfinish(self) -> None:
        """What the command status shows of a run that is over is in its records."""
        if self._reporter.folder is not None:
            clear_status(self._reporter.folder)
