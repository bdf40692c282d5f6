"""In the controller of a cluster: stands for the runner, and gives each test the row that a worker measured for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite.case import Case, digest
from kvsuite.distribution.gpus import Gpus
from kvsuite.errors import UserError
from kvsuite.record import Record

if TYPE_CHECKING:
    from kvsuite.cluster.dispatch import Finished


class _NoSessions:
    """In the place of the sessions: models are loaded where the workers are."""

    current = None


class ArrivedRows:
    """Stands for the runner in the process that measures nothing: gives a test the row that a worker measured for it.

    Parameters
    ----------
    update_environment
        Lets hooks of users add facts to an environment.
    gpus
        What workers are spread over, ``None`` for cores.
    """

    # of processes elsewhere, which their workers replace
    poisoned = None
    timed_out = False
    spent = None
    sessions = _NoSessions

    def __init__(self, update_environment: Callable[[dict[str, Any]], None], gpus: Gpus | None) -> None:
        self._update_environment = update_environment
        self._gpus = gpus
        self._arrived: dict[str, Finished] = {}
        self._environments: dict[str, dict[str, Any]] = {}
        #: of the row that was given last
        self.environment: dict[str, Any] = {}

    def arrive(self, finished: Finished) -> None:
        """A case has its row."""
        self._arrived[finished.order.id] = finished

    def run(self, case: Case, case_id: str, **_: object) -> Any:
        """The row of ``case`` as the record that it was.

        Raises
        ------
        UserError
            What a worker says that ends the run.
        """
        from kvsuite.measure.runner import Measured

        finished = self._arrived.pop(case_id, None)
        if finished is None or finished.order.case != case:
            pytest.fail(
                "kvsuite: --kv-cluster measures the case that a test is given by kv_suite, and no other; run this test "
                "without --kv-cluster",
                pytrace=False,
            )
        answer, node = finished.answer, finished.node
        if answer.record is None:
            raise UserError(f"{answer.usage_error} (on node {node})")
        self.environment = self._environment(answer.environment | {"node": node.facts()})
        known = {one.name: answer.record[one.name] for one in fields(Record) if one.name not in ("case", "id")}
        record = Record(case=case, id=case_id, **known)
        self._note_place(record, finished)
        return Measured(record, answer.tokens)

    def _note_place(self, record: Record, finished: Finished) -> None:
        """Say where it was measured, beside what, and which nodes had begun it before."""
        record.effective = record.effective | {
            "node": finished.node.facts(),
            "concurrent_workers": finished.workers,
        }
        if self._gpus is not None:
            record.effective["gpu"] = {"visible": finished.gpu, "simulated": self._gpus.simulated}
            if self._gpus.simulated:
                record.warnings.append("simulated GPU: measured on the CPU")
        if finished.workers > 1 and record.status == "ok":
            where = "its times are a shared machine's"
            if self._gpus is not None and not self._gpus.simulated:
                where = "each on a GPU of its own; they share CPU, power and PCIe"
            record.warnings.append(f"timed beside {finished.workers - 1} other worker(s) of its node: {where}")
        if finished.order.lost_on:
            lost = ", ".join(finished.order.lost_on)
            record.warnings.append(f"given back once: node {lost} was lost or out of reach while it measured this case")

    def _environment(self, found: dict[str, Any]) -> dict[str, Any]:
        """Facts of a worker, with what hooks of users add: the same for all its rows."""
        key = digest(found)
        if key not in self._environments:
            self._update_environment(found)
            self._environments[key] = found
        return self._environments[key]
