"""``python -m kvsuite.cluster.measuring_process``: measures the cases that its worker sends, one after another.

A process of its own below the worker, so that somebody is left on the host who sees by which signal it died, whose time limit
holds while native code hangs, and who gives the next case a new process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvsuite.case import digest
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.devices import resolve_device
from kvsuite.record import Record
from kvsuite.survival.black_box import BlackBox
from kvsuite.survival.death import die_with_parent

from .orders import CaseAnswer, Order, Ready, Setup


class _BoxBesideThis(BlackBox):
    """A black box that the worker keeps: every entry goes there at once."""

    def __init__(self, channel: Connection) -> None:
        super().__init__(None)
        self._channel = channel

    def _write(self) -> None:
        self._channel.send(self._entry)


def main(descriptor: int) -> None:
    """Answer a `Setup` with a `Ready` (or a text that says why not), and every `Order` with a `CaseAnswer`, until nobody asks.

    Before an answer come the entries of the case's black box, as they are made.

    Parameters
    ----------
    descriptor
        Of the connection to the worker.
    """
    die_with_parent()
    # Ray's workers give way to all else on a host, and what is timed must not; who may not say so is warned in each row
    if os.nice(0) > 0:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
    # Ctrl-C in a terminal is for the controller, which ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Connection(descriptor) as channel, contextlib.suppress(EOFError):
        try:
            measuring = _Measuring(channel.recv(), _BoxBesideThis(channel))
            ready = measuring.ready()
        except Exception as error:  # packages of others are among what may fail
            channel.send(f"{type(error).__name__}: {error}")
            raise
        channel.send(ready)
        try:
            while True:
                channel.send(measuring.measure(channel.recv()))
        finally:
            measuring.close()


class _Measuring:
    def __init__(self, setup: Setup, box: BlackBox) -> None:
        from kvsuite.engines.registry import SessionPool
        from kvsuite.measure.runner import CaseRunner
        from kvsuite.meters.environment import gpu_facts, host_facts
        from kvsuite.metrics.registry import MetricRegistry
        from kvsuite.suites.registry import measuring_suite

        if Path(setup.folder).is_dir():
            os.chdir(setup.folder)
        self._setup, self._box = setup, box
        common = setup.options.of(CommonOptions)
        self._device = resolve_device(common.device)
        self._sessions = SessionPool(setup.options)
        self._uses = list(dict.fromkeys((case.engine, case.device) for case in setup.planned))
        versions = {}
        for name, device in sorted(self._uses):
            # one that cannot be used measures nothing here, and its version is no difference between nodes
            with contextlib.suppress(UserError):
                if self._sessions.engine(name).unavailable(device) is None:
                    versions[name] = self._sessions.versions(name)
        self.environment: dict[str, Any] = host_facts(setup.command) | {
            "gpu": gpu_facts(self._device),
            "engines": versions,
        }
        self._runner = CaseRunner(
            setup.options, MetricRegistry(setup.metrics), self.environment, self._sessions, measuring_suite,
            planned=setup.planned, watch=self._tell_box,
        )  # fmt: skip

    def ready(self) -> Ready:
        from kvsuite.measure.source_hash import others_code, source_hash

        environment = self.environment
        memory = environment["gpu"].get("memory_bytes") or environment["host"]["ram_bytes"]
        unusable: dict[tuple[str, str], str] = {}
        try:
            self._look_for_inputs()
            unusable = self._unusable()
            refusal = "; ".join(dict.fromkeys(unusable.values())) if len(unusable) == len(self._uses) else ""
        except UserError as error:
            refusal = str(error)
        for name in sorted({name for name, device in self._uses if (name, device) not in unusable}):
            self._sessions.engine(name).import_libraries()
        code = {"kvsuite": source_hash()} | others_code(self._setup.planned)
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
        return Ready(environment, code, memory, gpu, refusal or None, frozenset(unusable))

    def _look_for_inputs(self) -> None:
        from kvsuite.models.resolve import resolve_model
        from kvsuite.workloads.corpus import check_corpus

        common = self._setup.options.of(CommonOptions)
        for model in dict.fromkeys(case.model for case in self._setup.planned):
            resolve_model(model, cache_dir=Path(common.cache_dir) if common.cache_dir else None)
        if "corpus" in self._setup.options.given:
            check_corpus(common.corpus)

    def _unusable(self) -> dict[tuple[str, str], str]:
        """Why engines cannot be used here, by name and device."""
        reasons = {(name, device): self._sessions.engine(name).unavailable(device) for name, device in self._uses}
        return {use: reason for use, reason in reasons.items() if reason is not None}

    def measure(self, order: Order) -> CaseAnswer:
        self._box.begin(order.record(self._setup.options, self.environment), self.environment)
        try:
            measured = self._runner.run(order.case, order.id, order_index=order.order_index)
        except UserError as error:
            return CaseAnswer(None, None, self.environment, usage_error=str(error))
        runner, niceness = self._runner, os.nice(0)
        if niceness > 0:
            measured.record.warnings.append(
                f"measured at niceness {niceness}, as Ray starts its workers: whatever else ran on the node came first; start "
                "Ray there with RAY_worker_niceness=0"
            )
        is_spent = bool(runner.poisoned or runner.timed_out or runner.spent)
        return CaseAnswer(measured.record.to_dict(), measured.tokens, self.environment, is_spent=is_spent)

    def _tell_box(self, record: Record, phase: str) -> None:
        record.env = digest(self.environment)
        self._box.tell(phase=phase, row=record.to_dict())

    def close(self) -> None:
        self._sessions.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
