"""One case's passes in their order, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.options.common import CommonOptions
from kvsuite.record import Record
from kvsuite.suites.compression.quality import score_through_cache
from kvsuite.suites.dse.cases import SERVING
from kvsuite.suites.dse.measure import measure_point
from kvsuite.suites.perplexity.quality import WindowQuality, refuse_before_loading
from kvsuite.workloads.windows import PROTOCOLS as WINDOW_PROTOCOLS

from .single_request import measure_speed

if TYPE_CHECKING:
    from .runner import CaseRunner

RunRounds = Callable[[Callable[[], None], int], None]


class Phase(Protocol):
    """Is told how far a phase came."""

    def __call__(self, phase: str, done: int, of: int, note: str = "") -> None: ...


@dataclass
class Measured:
    """A record, and what belongs beside it: raw per-token rows for the sidecar."""

    record: Record
    tokens: dict[str, list[Any]] | None = None


class CasePasses:
    """Runs the passes of one case on a runner's session; ``phase`` says how far it came."""

    def __init__(
        self, runner: CaseRunner, case: Case, measured: Measured, run_rounds: RunRounds, progress: Phase
    ) -> None:
        self.runner = runner
        self.case = case
        self.measured = measured
        self.record = measured.record
        self.run_rounds = run_rounds
        self.progress = progress
        self._phase = "setup"
        self.session: Session | None = None
        self.dataset_revision: str | None = None
        record = self.record
        record.case_key = case.key(model_revision=None, dataset_revision=None)
        record.partition["requested"] = None if case.partition is None else dict(case.partition)
        self.phase = "load"

    @property
    def phase(self) -> str:
        """How far the case came."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self.runner.watch(self.record, phase)

    def run(self) -> None:
        """Quality, memory, speed; then what needs a second model beside the first."""
        if self.case.workload["protocol"] == SERVING:
            measure_point(self)
            return
        record = self.record
        windows = self.case.workload["protocol"] in WINDOW_PROTOCOLS
        if windows:
            refuse_before_loading(self.case)
        session = self.open()
        # what only rounds weights computes at the speed and in the memory of the dense model
        quality_only = bool((session.model.get("quantization") or {}).get("quality_only"))
        scoring = WindowQuality(self, session) if windows else None
        # a prompt that the corpus cannot give must not be found out after minutes of scoring
        prompts = [] if quality_only else self._prompts(session)
        self.phase = "quality"
        if scoring:
            scoring.score(timed=not quality_only)
        else:
            score_through_cache(self, session)
        self.name_case()
        if quality_only:
            record.inert["speed"] = f"{self.case.quantization} is rounded and kept dense: quality only"
        else:
            self.put_weight_format(session)
            measure_speed(self, session, prompts)
        self.take_over(session)
        if scoring and self.case.params["reference"]:
            self.phase = "reference"
            scoring.compare()

    def open(self) -> Session:
        """The session of the case, loaded and prepared."""
        session = self.session = self.runner.sessions.get(self.case)
        self.record.model = dict(session.model)
        self.name_case()
        session.prepare(self.case)
        return session

    def take_over(self, session: Session) -> None:
        """Write what the engine really applied into the record."""
        self.record.effective = dict(session.effective)
        self.record.inert |= session.inert
        self.record.partition = dict(session.partition)

    def finish(self) -> None:
        """End of the case, whatever happened in it."""
        if self.session is not None:
            self.record.effective = self.record.effective or dict(self.session.effective)
            try:
                self.session.finish()
            except Exception as error:  # a broken device must not take the finished record with it
                self.record.warnings.append(f"cleaning up after the case failed: {error}")

    def put(self, name: str, samples: Any, **facts: Any) -> None:
        """Write metric ``name`` into the record."""
        self.record.metrics[name] = self.runner.registry.value(name, samples, **facts)

    def name_case(self) -> None:
        """Give the record its key, from what is known of model and text so far."""
        model = self.record.model
        case = self.case
        if case.dtype == "checkpoint" and self.session is not None:
            case = replace(case, dtype=self.session.dtype_name)
        self.record.case_key = case.key(model_revision=model.get("revision"), dataset_revision=self.dataset_revision)

    def _prompts(self, session: Session) -> list[list[int]]:
        options = self.runner.options.of(CommonOptions)
        count = options.num_warmup + options.rounds + 1
        return self.runner.texts.prompts(session, self.case.workload, count=count, seed=options.seed)

    def put_weight_format(self, session: Session) -> None:
        """Write what the weight format predicts and takes."""
        facts = session.model.get("quantization")
        if facts is None:
            return
        self.put("mem_predicted_weights_bytes", facts["predicted_weight_bytes"])
        self.put("bits_per_weight", facts["bits_per_weight"])
        self.put("bits_per_weight_without_embeddings", facts["bits_per_weight_without_embeddings"])
