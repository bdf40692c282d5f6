"""One case, measured: quality, then memory, then speed, into one record. Whatever happens, a record comes out."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kvsuite.case import Case, digest
from kvsuite.engines.registry import SessionPool
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.measure.case_passes import CasePasses, Measured, Phase, RunRounds
from kvsuite.meters.clock import Clock, clock_for
from kvsuite.meters.environment import fingerprint
from kvsuite.meters.gpu_processes import GpuProcesses
from kvsuite.meters.host_load import watched
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.record import Record
from kvsuite.suites.perplexity.cases import dataset_name
from kvsuite.suites.perplexity.options import PerplexityOptions
from kvsuite.workloads.texts import TextSource

from .deadline import CaseTimeout, alarm, stopped
from .source_hash import source_hash

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


def _unwatched(record: Record, phase: str) -> None:
    return None


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
    clock
        Makes the clock of a device; a scripted one checks the formulas.
    planned
        All cases of the run, in the order of their space: of two that differ only in the name of one text the first is
        measured, whichever comes first in time and in whichever process.
    watch
        Is told the record so far whenever a phase of a case begins.
    poisoned
        Why this process can measure nothing more on a CUDA device, ``None`` while it can.
    timed_out
        Whether a case had to be stopped: what it left behind is not known.
    """

    options: Options
    registry: MetricRegistry
    environment: dict[str, Any]
    sessions: SessionPool
    clock: Callable[[Any], Clock] = clock_for
    texts: TextSource = field(default_factory=TextSource)
    planned: Sequence[Case] = ()
    watch: Callable[[Record, str], None] = _unwatched
    poisoned: str | None = None
    timed_out: bool = False

    def __post_init__(self) -> None:
        options = self.options.of(PerplexityOptions)
        self.texts.datasets = {dataset_name(request): request for request in options.dataset}
        self.texts.dataset_path = options.dataset_path

    def run(
        self,
        case: Case,
        case_id: str,
        *,
        order_index: int = 0,
        run_rounds: RunRounds = plain_rounds,
        progress: Phase | None = None,
    ) -> Measured:
        """Measure ``case``; every failure but bad input becomes the record's status.

        Raises
        ------
        UserError
            For bad input that only loading could find: the run cannot go on.
        """
        options = self.options.of(CommonOptions)
        record = Record(
            case=case, id=case_id, rounds=options.rounds, warmup=options.num_warmup, order_index=order_index,
            seed=options.seed, started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        measured = Measured(record)
        work = CasePasses(self, case, measured, run_rounds, progress or _silent)
        work.run_rounds = watched(run_rounds, work.put)
        # until it is known what the case put into its record, for whoever finds this process dead
        record.settings_hash = self._settings(case, record)
        begin = time.monotonic()
        processes = GpuProcesses(case.device)
        limit = self.options.of(SweepOptions).timeout
        try:
            with alarm(limit):
                if self.poisoned is not None and case.device_kind == "cuda":
                    raise DevicePoisoned(self.poisoned)
                work.run()
        except CaseTimeout:
            assert limit is not None, "without a limit there is no alarm"
            reason = stopped(limit)
            record.status, record.reason, self.timed_out = "crashed", reason, True
            record.error = {"type": "Timeout", "message": reason, "phase": work.phase, "traceback": _traceback()}
        except CaseSkipped as skip:
            record.status, record.reason = "skipped", str(skip)
        except CaseInvalid as invalid:
            record.status, record.reason = "invalid", str(invalid)
        except UserError:
            raise
        except Exception as error:
            record.status = "oom" if is_out_of_memory(error) else "error"
            record.error = {
                "type": type(error).__name__,
                "message": str(error),
                "phase": work.phase,
                "traceback": _traceback(),
            }
            if is_cuda_error(error):
                self.poisoned = (
                    f"not measured: the CUDA error of {case_id} left this process no device to trust; with -n 1 xdist gives "
                    "the next case a new process, and --kv-resume=latest measures the others"
                )
        finally:
            work.finish()
            if record.status == "crashed":
                # a model that was stopped in the middle is in a state that is not known
                self.sessions.close()
        record.effective |= processes.effective()
        record.warnings += processes.warnings()
        record.duration_s = time.monotonic() - begin
        record.settings_hash = self._settings(case, record)
        return measured

    def _settings(self, case: Case, record: Record) -> str:
        options = self.options.of(CommonOptions)
        versions = self.sessions.versions(case.engine)
        return digest(
            {
                "rounds": options.rounds,
                "warmup": options.num_warmup,
                "seed": options.seed,
                "metrics": {name: self.registry[name].version for name in sorted(record.metrics)},
                "source": source_hash(),
                "fingerprint": fingerprint(self.environment, engine=case.engine, versions=versions),
            }
        )


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
