"""Engine: one runtime under test. Session: one loaded engine, which says what it really applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvsuite.cache_formats.by_layer import ByLayerFormat, OwnFormat, refused_heads
from kvsuite.cache_formats.cast_format import CastFormat
from kvsuite.cache_formats.chosen_format import PARAMETER, format_of
from kvsuite.cache_formats.ggml_format import GgmlFormat
from kvsuite.case import Case
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import Architecture, architecture_of
from kvsuite.memory_model.design_point import Check
from kvsuite.memory_model.prediction import Part, Predictor
from kvsuite.meters.clock import Clock
from kvsuite.options.common import CommonOptions
from kvsuite.options.option import OptionGroup
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options, default_options

from .results import MemoryPass, Reach, Served, ServeRequest


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What every engine is told beside the case.

    Parameters
    ----------
    seed
        Of a dummy model's weights.
    threads
        CPU threads, ``None`` for the engine's own choice.
    decode_step
        ``eager``, ``graph``, or ``auto``: captured on CUDA where the engine can.
    attention
        ``sdpa``, ``eager``, or ``auto``: sdpa where the model has it.
    implementation
        Slot handling of policies on `hf`: ``ring`` or ``copy``.
    cache_dir
        Where converted models lie.
    """

    seed: int = 0
    threads: int | None = None
    decode_step: str = "auto"
    attention: str = "auto"
    implementation: str = "ring"
    cache_dir: Path | None = None

    @classmethod
    def of(cls, options: Options) -> EngineSettings:
        """Those of a run."""
        common = options.of(CommonOptions)
        return cls(
            seed=common.seed,
            threads=common.threads,
            decode_step=common.decode_step,
            attention=common.attention,
            implementation=common.impl,
            cache_dir=None if common.cache_dir is None else Path(common.cache_dir),
        )


class Session(ABC):
    """One loaded engine. The vocabulary of a case goes in, stamps, bytes and what its capabilities give come out.

    What not every engine can do is a protocol of `kvsuite.engines.capabilities`: a session has it by having its members.

    Attributes
    ----------
    effective
        What the runtime really applied: dtype, attention, threads, decode step, …
    inert
        Requested axes that do not reach the runtime, each with the reason.
    partition
        Requested and realised SM partition.
    model
        Facts of the loaded model. ``label``, ``kind``, ``revision`` (part of a record's key), ``weights_bytes``,
        ``step_weight_bytes`` (weights that a decode step reads), ``trained_length`` and ``is_dummy`` (random weights: nothing
        is scored) are read by suites and ``None`` where the engine does not tell; others are for the record.
    """

    #: why a capability is missing, for those where the engine has more to say than that
    lacks: ClassVar[Mapping[type, str]] = {}
    #: what the parts of predicted memory are called in a record
    memory_parts: ClassVar[Mapping[Part, str]] = {
        "parameters": "weights_bytes",
        "kv_cache": "pool_bytes",
        "temporary": "workspace_bytes",
    }

    def __init__(self) -> None:
        self._bandwidth: float | None = None
        self.effective: dict[str, Any] = {}
        self.inert: dict[str, str] = {}
        self.partition: dict[str, Any] = {"requested": None, "realised": None}
        self.model: dict[str, Any] = dict.fromkeys(
            ("label", "kind", "revision", "weights_bytes", "step_weight_bytes", "trained_length")
        ) | {"is_dummy": False}

    @abstractmethod
    def prepare(self, case: Case) -> None:
        """Make ready what ``case`` needs (policy, limits of a design point); called before any other method.

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

    # requests

    @abstractmethod
    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        """Serve all requests at once: prefill, then exactly the tokens that each wants, greedily.

        With prefix caching on, prompts that were served just before are found again.

        Parameters
        ----------
        requests
            One or more.
        clock
            Started when the requests go in and marked when tokens are there. Without one nothing is timed: a warm-up, or a
            run for its tokens.

        Raises
        ------
        CaseInvalid
            For more requests than this engine serves at a time, and for arrivals and forced output, which only
            `kvsuite.engines.capabilities.ServesUnderLoad` has.
        """

    @abstractmethod
    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        """Run the shape of `serve` once with the memory meters on; bytes are those of all requests together.

        Raises
        ------
        CaseInvalid
            For more requests than this engine serves at a time.
        """

    def capture(self, requests: Sequence[ServeRequest]) -> None:
        """Make ready what only timed runs of this shape need (captured decode steps)."""
        return None

    def clock(self, usual: Clock) -> Clock:
        """The clock of its times: ``usual``, that of the device, unless only a client can tell."""
        return usual

    def reach(self, case: Case) -> Reach:
        """What of a design point, the prepared one or another of the same model, reaches the runtime.

        Raises
        ------
        CaseInvalid
            If this engine serves one request at a time.
        """
        raise CaseInvalid(
            f"engine {case.engine} serves one request at a time; use batch=1, or --kv-engine=nano where it can run the model"
        )

    def engine_metrics(self, served: Sequence[Served]) -> dict[str, float]:
        """What the engine itself counted in these runs, by its own names; ``{}`` where it counts nothing."""
        return {}

    # bytes

    @abstractmethod
    def full_kv_bytes(self, tokens: int) -> int:
        """Bytes of the full cache of ``tokens`` tokens."""

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int | None:
        """Predicted cache bytes of so many requests of the prepared case at the end of decode.

        ``None`` where that is not known (`planned_unknown`).
        """
        return None

    def planned_unknown(self) -> str:
        """Why `planned_kv_bytes` is ``None``."""
        return "the press decides how much it keeps"

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> float:
        """Cache bytes that a decode step of so many requests reads: those its queries can see, mean over the steps."""
        lengths = range(prompt_tokens + 1, prompt_tokens + new_tokens)
        return requests * sum(map(self.full_kv_bytes, lengths)) / len(lengths)

    def floor_unknown(self) -> str | None:
        """Why the floor of a decode step is not known, ``None`` if it is."""
        return "the engine does not tell the bytes of its weights" if self.model["step_weight_bytes"] is None else None

    def memory_model(self, architecture: Architecture) -> Predictor | None:
        """Predicts the memory of the prepared design point, ``None`` where there are no formulas.

        As `Engine.memory_model`, with what only a loaded session knows.
        """
        return None

    def finish(self) -> None:  # noqa: B027
        """End of the case: drop what it held."""

    def close(self) -> None:  # noqa: B027
        """Give everything back."""


class Engine(ABC):
    """One runtime, by the name of its entry point in the group ``kvsuite.engines``.

    Its module is imported when a case, or a plan, asks for the engine; what needs the runtime is imported inside functions,
    so that memory is predicted without it.

    Parameters
    ----------
    options
        Of the run, the defaults if left out; an engine reads its own by ``self.options.of(...)``.
    """

    name: ClassVar[str]
    #: its own options, which come in by the entry-point group ``kvsuite.options``
    option_group: ClassVar[type[OptionGroup] | None] = None
    #: whether an installation is whole without it
    is_optional: ClassVar[bool] = True
    #: whether its sessions store keys and values in the formats of `kvsuite.cache_formats`
    stores_cache_formats: ClassVar[bool] = False
    #: whether a format may differ from layer to layer
    stores_formats_by_layer: ClassVar[bool] = False
    #: options of ``python -m kvsuite predict`` that `predictor` reads, by name
    predictor_options: ClassVar[frozenset[str]] = frozenset()
    #: how far its perplexity may be from transformers' on the same weights and tokens, relatively, by the dtype in which it
    #: computes: what it promises (``python -m kvsuite parity``). A dtype that is not there is no promise
    perplexity_bounds: ClassVar[Mapping[str, float]] = {}
    #: what it asks of a design point beside the rules of every engine, by the rule's name; a check says what is wrong
    point_rules: ClassVar[Mapping[str, Check]] = {}

    def __init__(self, options: Options | None = None) -> None:
        self.options = default_options() if options is None else options

    @abstractmethod
    def unavailable(self, device: str) -> str | None:
        """Why this engine cannot use ``device`` here, with the install line or the mend; ``None`` if it can."""

    @abstractmethod
    def version(self) -> dict[str, str]:
        """Versions of all that computes, by name: numbers of other versions are other measurements.

        Asked for every case; the runtime need not be loaded for it.
        """

    def import_libraries(self) -> None:  # noqa: B027
        """Import what loading a model would, where that takes seconds: a worker does so before its first case."""

    def refuse(self, case: Case) -> None:
        """Refuse a case that no session of this engine can run, before anything is loaded.

        Raises
        ------
        CaseInvalid
            With the reason and the mend.
        """
        chosen = format_of(case)
        if isinstance(chosen, CastFormat) and chosen.engine != self.name:
            raise CaseInvalid(
                f"--kv-cache-dtype={chosen}: is a format of engine {chosen.engine} alone; use --kv-engine={chosen.engine}, or "
                "--kv-cache-dtype=auto"
            )
        if isinstance(chosen, GgmlFormat):
            raise CaseInvalid(
                f"--kv-cache-dtype={chosen.label}: is llama.cpp's, and engine {self.name} does not store it; use "
                "--kv-engine=llamacpp, or --kv-cache-dtype=auto"
            )
        if chosen is not None and not self.stores_cache_formats:
            raise CaseInvalid(
                f"--kv-cache-dtype={chosen.label}: engine {self.name} stores keys and values in the model's own numbers alone; "
                "use --kv-cache-dtype=auto, or --kv-engine=hf for cases of one request"
            )
        if isinstance(chosen, ByLayerFormat) and not self.stores_formats_by_layer:
            raise CaseInvalid(
                f"--kv-cache-dtype={chosen.label}: engine {self.name} stores all layers in one format; use --kv-engine=hf, or "
                "a format without by_layer"
            )
        if isinstance(chosen, OwnFormat) and (reason := self._refused_heads(chosen, case.model)):
            raise CaseInvalid(f"--kv-cache-dtype={chosen.label}: {reason}")

    def refused_cache(self, model: str, name: str) -> str | None:
        """Why no case stores keys and values of a model in the cache format ``name``, ``None`` if cases may."""
        try:
            self.refuse(Case("", self.name, model, name, "cuda:0", "bfloat16", params={PARAMETER: name}))
        except CaseInvalid as error:
            return str(error)
        return None

    def _refused_heads(self, chosen: OwnFormat, model: str) -> str | None:
        """Why a model cannot be stored in a format, as far as its configuration says."""
        folder = self.options.of(CommonOptions).cache_dir
        try:
            known = architecture_of(model, cache_dir=None if folder is None else expanded(folder)).cache
        except UserError:
            # whoever loads the model says what is wrong with it
            return None
        return None if isinstance(known, str) else refused_heads(chosen, known)

    def memory_model(self, architecture: Architecture, case: Case) -> Predictor | None:
        """Predicts the memory of design points on the device of ``case``, ``None`` where there are no formulas.

        From the configuration alone: nothing is loaded, and the runtime is not imported.
        """
        return None

    def predictor(self, architecture: Architecture, given: Mapping[str, Any]) -> Predictor | None:
        """Predicts the memory of a whole design space, without cases; ``None`` where there are no formulas.

        Parameters
        ----------
        architecture
            Of the model.
        given
            ``model`` as it was typed, and values of `predictor_options`, ``None`` for those that were not given.

        Raises
        ------
        UserError
            For a value, or a model, that this engine cannot take.
        """
        return None

    def is_preferred(self, device_kind: str) -> bool:
        """Whether a suite that both engines can serve takes this one before its usual one, if nobody names an engine.

        Asked when cases are made, so it looks at no more than what is installed.
        """
        return False

    def default_formats(self, model: str) -> tuple[str, ...] | None:
        """Weight formats in which a suite serves ``model`` if nobody names one; ``None`` for the suite's own."""
        return None

    def case_params(self) -> dict[str, Any]:
        """What of the engine's options makes another case: JSON types by name, for `Case.params`."""
        return {}

    @abstractmethod
    def load(self, case: Case, settings: EngineSettings) -> Session:
        """Load the model of ``case``.

        Raises
        ------
        UserError, CaseSkipped, CaseInvalid
            If it cannot be loaded, or not for such a case.
        """
