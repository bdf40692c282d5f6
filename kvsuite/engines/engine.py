"""Engine: one runtime under test. Session: one loaded engine, which says what it really applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import Case
from kvsuite.errors import CaseInvalid
from kvsuite.meters.clock import Clock
from kvsuite.meters.memory import Phase, Reading
from kvsuite.meters.quality import TokenScores
from kvsuite.meters.timing import RequestTimes
from kvsuite.workloads.windows import Window

if TYPE_CHECKING:
    from kvsuite.meters.divergence import TokenDivergence

    from .serving import Serving
    from .window_scoring import Progress as WindowProgress
    from .window_scoring import WindowScores


@dataclass
class MemoryPass:
    """What the instrumented pass of a case found; it is never timed.

    An engine that does not tell what its cache holds leaves ``kv_bytes_*`` out and says why in ``unseen``.
    """

    prefill: Phase
    decode: Phase
    resident: Reading
    driver: Reading
    kv_bytes_prefill: int | None
    kv_bytes_decode: int | None
    kv_bytes_allocated: int | None
    lengths_prefill: list[int]
    lengths_decode: list[int]
    compress_s: float | None = None
    evict_s: float | None = None
    unseen: str | None = None
    effective: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: further terms in bytes, predicted from formulas and reported by the engine, for an engine that has them
    predicted: dict[str, int] = field(default_factory=dict)
    reported: dict[str, int] = field(default_factory=dict)


class Session(ABC):
    """One loaded engine. The vocabulary of a case goes in, stamps, losses and bytes come out.

    Attributes
    ----------
    effective
        What the runtime really applied: dtype, attention, threads, decode step, …
    inert
        Requested axes that do not reach the runtime, each with the reason.
    partition
        Requested and realised SM partition.
    model
        Facts of the loaded model: label, kind, revision, parameters, notes.
    """

    #: why an engine cannot do what it leaves out
    refusal: ClassVar[str] = "this engine cannot do that"

    def __init__(self) -> None:
        self._bandwidth: float | None = None
        self.effective: dict[str, Any] = {}
        self.inert: dict[str, str] = {}
        self.partition: dict[str, Any] = {"requested": None, "realised": None}
        self.model: dict[str, Any] = {}

    @abstractmethod
    def prepare(self, case: Case) -> None:
        """Make ready what ``case`` needs (policy, method); called before any other method.

        Raises
        ------
        UserError, CaseSkipped, CaseInvalid
            If the case cannot run on this session.
        """

    @property
    @abstractmethod
    def device(self) -> Any:
        """The ``torch.device`` the session runs on."""

    @property
    @abstractmethod
    def dtype_name(self) -> str:
        """The dtype the model really computes in."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer, ``None`` for a dummy model."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids lie in ``[0, vocab_size)``."""

    @property
    def bandwidth(self) -> float:
        """Measured copy bandwidth of the device in bytes a second, read plus written."""
        if self._bandwidth is None:
            from kvsuite.meters.bandwidth import copy_bandwidth

            self._bandwidth = copy_bandwidth(self.device)
        return self._bandwidth

    @abstractmethod
    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes of the full cache of ``tokens`` tokens."""

    # what measures one request or one text at a time; an engine that serves several at once may leave it out

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int) -> int | None:
        """Predicted cache bytes of the prepared case at the end of decode, ``None`` where only the method knows."""
        raise CaseInvalid(self.refusal)

    @property
    def ratio_requested(self) -> float | None:
        """Fraction removed that the prepared case asks for, ``None`` where it asks for sizes."""
        return None

    def warm(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Run the timed shape once, untimed."""
        raise CaseInvalid(self.refusal)

    def capture(self, prompt: Sequence[int], new_tokens: int) -> None:
        """Make ready what only the timed rounds need (captured decode steps)."""
        return None

    def generate(self, prompt: Sequence[int], new_tokens: int, clock: Clock) -> RequestTimes:
        """Prefill ``prompt``, then decode exactly ``new_tokens`` greedily, stamping ``clock``."""
        raise CaseInvalid(self.refusal)

    def memory_pass(self, prompt: Sequence[int], new_tokens: int) -> MemoryPass:
        """Run the shape of `generate` once with the memory meters on."""
        raise CaseInvalid(self.refusal)

    def score(self, tokens: Sequence[int], protocol: str, prefix: int, progress: Any = None) -> TokenScores:
        """Teacher-forced losses of ``tokens`` through the case's cache by ``protocol``."""
        raise CaseInvalid(self.refusal)

    def score_reference(self, tokens: Sequence[int], first: int) -> TokenScores:
        """Losses of the same tokens from position ``first`` on by one teacher-forced forward with the full cache."""
        raise CaseInvalid(self.refusal)

    def score_windows(
        self,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> WindowScores:
        """Teacher-forced losses of the targets of ``windows`` (`kvsuite.workloads.windows`), each in its own window."""
        raise CaseInvalid(self.refusal)

    def compare_windows(
        self,
        reference: Session,
        tokens: Sequence[int],
        windows: Sequence[Window],
        *,
        prefix: str,
        prefix_token: int | None,
        progress: WindowProgress | None = None,
    ) -> TokenDivergence:
        """Losses of this session and of ``reference``, another one of this engine, and their divergence, by position.

        Raises
        ------
        UserError
            If the two do not share a vocabulary.
        """
        raise CaseInvalid(self.refusal)

    def generate_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy output of the prepared case: ``new_tokens`` token ids."""
        raise CaseInvalid(self.refusal)

    def serving(self, case: Case) -> Serving:
        """The prepared ``case`` as requests that are served together.

        Raises
        ------
        CaseInvalid
            If this engine serves one request at a time.
        """
        raise CaseInvalid(f"engine {case.engine} serves one request at a time; use --kv-engine=nano")

    @abstractmethod
    def finish(self) -> None:
        """End of the case: drop what it held."""

    def close(self) -> None:  # noqa: B027
        """Give everything back."""


class Engine(ABC):
    """One runtime, by name."""

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self, device: str) -> str | None:
        """Why this engine cannot use ``device`` here, with the install line or the mend; ``None`` if it can."""

    @abstractmethod
    def load(self, case: Case, **options: Any) -> Session:
        """Load the model of ``case``."""
