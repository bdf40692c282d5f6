"""One case, measured. Whatever happens, a record comes out: this is the one place that makes and fills it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from kvsuite.case import Case, digest
from kvsuite.engines.capabilities import lacking
from kvsuite.engines.engine import Session
from kvsuite.engines.engine_process import engine_pids
from kvsuite.engines.registry import SessionPool
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.meters.clock import Clock, clock_for
from kvsuite.meters.environment import fingerprint
from kvsuite.meters.gpu_processes import GpuProcesses
from kvsuite.meters.host_load import watched
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.record import Record
from kvsuite.workloads.texts import TextSource

from .case_run import CaseRun, MeasuresCases, PhaseProgress, RunRounds
from .deadline import CaseTimeout, alarm, stopped
from .energy import RoundEnergy
from .measurement import Measurement
from .source_hash import others_code, source_hash
from .unbuilt import without_builds

_TRACEBACK_LINES = 20
#: of torch, of Triton, and the driver's own words, which other libraries repeat
_CUDA_ERRORS = (
    "CUDA error:", "CUDA driver error:", "Triton Error [CUDA]", "illegal memory access", "device-side assert",
    "unspecified launch failure",
)  # fmt: skip


def plain_rounds(round_: Callable[[], None], rounds: int) -> None:
    """Run the timed rounds where no pytest-benchmark does."""
    for _ in range(rounds):
        round_()


def _silent(phase: str, done: int, of: int, note: str = "") -> None:
    return None


def _of_the_case(error: BaseException) -> None:
    return None


def _unwatched(record: Record, phase: str) -> None:
    return None


@dataclass
class Measured:
    """A record, and what belongs beside it: raw per-token rows for the sidecar."""

    record: Record
    tokens: dict[str, list[Any]] | None = None


class DevicePoisoned(RuntimeError):
    """An earlier CUDA error left this process no device to measure on."""


@dataclass
class CaseRunner:
    """Measures cases one after another on shared sessions.

    Parameters
    ----------
    options
        Resolved options.
    registry
        Known metrics.
    environment
        Facts of the run; the GPU's are added when the first session is up.
    suite
        Suites by name (`kvsuite.suites.registry.suite_named`).
    clock
        Makes the clock of a device; a scripted one checks the formulas.
    planned
        All cases of the run, in the order of their space: of two that differ only in the name of one text the first is
        measured, whichever comes first in time and in whichever process.
    watch
        Is told the record so far whenever a phase of a case begins.
    pass_on
        Is told every exception of a case, and raises those that end the run: what a signal raises must not become a case's
        status.
    poisoned
        Why this process can measure nothing more on a CUDA device, ``None`` while it can.
    timed_out
        Whether a case had to be stopped: what it left behind is not known.
    spent
        Why this process should measure nothing more at all, ``None`` while it can: a case was stopped while it imported or
        loaded, and what is half imported stays so.
    """

    options: Options
    registry: MetricRegistry
    environment: dict[str, Any]
    sessions: SessionPool
    suite: Callable[[str], MeasuresCases]
    clock: Callable[[Any], Clock] = clock_for
    texts: TextSource = field(default_factory=TextSource)
    planned: Sequence[Case] = ()
    watch: Callable[[Record, str], None] = _unwatched
    pass_on: Callable[[BaseException], None] = _of_the_case
    poisoned: str | None = None
    timed_out: bool = False
    spent: str | None = None

    def run(
        self,
        case: Case,
        case_id: str,
        *,
        order_index: int = 0,
        run_rounds: RunRounds = plain_rounds,
        progress: PhaseProgress | None = None,
    ) -> Measured:
        """Measure ``case``; every failure but bad input becomes the record's status.

        Raises
        ------
        UserError
            For bad input that only loading could find: the run cannot go on.
        """
        common = self.options.of(CommonOptions)
        record = Record(
            case=case, id=case_id, rounds=common.rounds, warmup=common.num_warmup, order_index=order_index,
            seed=common.seed, started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        work = _Work(self, record, progress or _silent, run_rounds)
        # until it is known what was found, for whoever finds this process dead
        record.settings_hash = self._settings(case, record)
        timeout = self.options.of(SweepOptions).timeout
        begin = time.monotonic()
        processes = GpuProcesses(case.device, engine_pids)
        try:
            with alarm(timeout):
                if self.poisoned is not None and case.device_kind == "cuda":
                    raise DevicePoisoned(self.poisoned)
                work.measure(self.suite(case.suite))
        except BaseException as error:
            self.pass_on(error)
            self._failed(work, error)
        finally:
            work.finish()
            if record.status == "crashed":
                # a model that was stopped in the middle is in a state that is not known
                self.sessions.close()
        record.effective |= processes.effective()
        record.warnings += processes.warnings()
        record.duration_s = time.monotonic() - begin
        record.settings_hash = self._settings(case, record)
        return Measured(record, work.found.sidecar)

    def _failed(self, work: _Work, error: BaseException) -> None:
        """Make ``error``, which is being handled, the status of its case; raise it if it is none."""
        record = work.record
        if isinstance(error, CaseTimeout):
            limit = self.options.of(SweepOptions).timeout
            assert limit is not None
            reason = stopped(limit)
            record.status, record.reason, self.timed_out = "crashed", reason, True
            if error.importing or work.phase == "load":
                self.spent = (
                    f"{record.id} was stopped while it imported or loaded, which leaves this process unfit for others"
                )
            record.error = {"type": "Timeout", "message": reason, "phase": work.phase, "traceback": _traceback()}
        elif isinstance(error, CaseSkipped):
            record.status, record.reason = "skipped", str(error)
        elif isinstance(error, CaseInvalid):
            record.status, record.reason = "invalid", str(error)
        elif isinstance(error, UserError) or not isinstance(error, Exception | SystemExit):
            raise error
        else:
            record.status = "oom" if is_out_of_memory(error) else "error"
            record.error = {
                "type": type(error).__name__,
                "message": str(error),
                "phase": work.phase,
                "traceback": _traceback(),
            }
            if is_cuda_error(error):
                self.poisoned = (
                    f"not measured: the CUDA error of {record.id} left this process no device to trust; with -n 1 xdist "
                    "gives the next case a new process, and --kv-resume=latest measures the others"
                )

    def _settings(self, case: Case, record: Record) -> str:
        common = self.options.of(CommonOptions)
        versions = self.sessions.versions(case.engine)
        others = others_code([case])
        return digest(
            {
                "rounds": common.rounds,
                "warmup": common.num_warmup,
                "seed": common.seed,
                "metrics": {name: self.registry[name].version for name in sorted(record.metrics)},
                "source": {"kvsuite": source_hash()} | others if others else source_hash(),
                "fingerprint": fingerprint(self.environment, engine=case.engine, versions=versions),
            }
        )


class _Work:
    """One case on its way: the record, what was found so far, and the session."""

    def __init__(self, runner: CaseRunner, record: Record, progress: PhaseProgress, run_rounds: RunRounds) -> None:
        self.runner, self.record, self.case = runner, record, record.case
        self.found = Measurement(runner.registry)
        self.session: Session | None = None
        self.phase = "setup"
        self.energy = RoundEnergy(record.case.device)
        record.partition["requested"] = None if self.case.partition is None else dict(self.case.partition)
        self.run = CaseRun(
            case=self.case,
            options=runner.options,
            found=self.found,
            texts=runner.texts,
            planned=runner.planned,
            progress=progress,
            rounds=without_builds(watched(self.energy.metered(run_rounds), self.found.put), self.case.device),
            clock=runner.clock,
            beside=runner.sessions.beside,
            begins=self.begins,
            applied=self.take_over,
        )
        self.begins("load")

    def begins(self, phase: str) -> None:
        """A phase begins: whoever finds this process dead needs what is known so far."""
        self.phase = phase
        self.fill()
        self.runner.watch(self.record, phase)

    def measure(self, suite: MeasuresCases) -> None:
        """Load the case's model and let its suite measure."""
        suite.refuse(self.case, self.runner.options)
        self.runner.sessions.engine(self.case.engine).refuse(self.case)
        session = self.session = self.runner.sessions.get(self.case)
        self.record.model = dict(session.model)
        session.prepare(self.case)
        for capability in suite.needs(self.case):
            if reason := lacking(session, capability):
                raise CaseInvalid(f"suite {self.case.suite}: {reason}")
        found = suite.measure(self.case, session, self.run)
        if not isinstance(found, Measurement):
            # suites are others' too
            raise TypeError(
                f"suite {self.case.suite}: measure() returned {found!r}, not a Measurement; return run.found"
            )
        self.found = found
        self.energy.put(found)
        self.take_over()

    def take_over(self) -> None:
        """What the engine really applied goes into the record."""
        if self.session is not None:
            self.record.effective = dict(self.session.effective)
            self.found.inert |= self.session.inert
            self.record.partition = dict(self.session.partition)

    def fill(self) -> None:
        """What was found so far goes into the record, and with it the case's key."""
        found, record, case = self.found, self.record, self.case
        record.metrics, record.memory, record.tokens = found.metrics, found.memory, found.tokens
        record.samples, record.inert, record.warnings = found.samples, found.inert, found.warnings
        record.dataset = found.dataset
        if case.dtype == "checkpoint" and self.session is not None:
            case = replace(case, dtype=self.session.dtype_name)
        record.case_key = case.key(model_revision=record.model.get("revision"), dataset_revision=found.dataset_revision)

    def finish(self) -> None:
        """End of the case, whatever happened in it."""
        self.fill()
        if self.session is not None:
            self.record.effective = self.record.effective or dict(self.session.effective)
            try:
                self.session.finish()
            except Exception as error:  # a broken device must not take the finished record with it
                self.record.warnings.append(f"cleaning up after the case failed: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def is_cuda_error(error: BaseException) -> bool:
    """Whether ``error`` came from a CUDA device that will answer every later call with it (memory that ran out is none)."""
    if is_out_of_memory(error):
        return False
    # torch.AcceleratorError since 2.8; by name, because a run without a GPU need not know it
    if type(error).__name__ == "AcceleratorError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CUDA_ERRORS)


def _traceback() -> str:
    return "\n".join(traceback.format_exc().splitlines()[-_TRACEBACK_LINES:])
