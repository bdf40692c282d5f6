"""A session of the `mlc` engine: one model in one weight format for MLC-LLM, for the design-space suite."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.capabilities import ScoresWindows, refuse_load
from kvsuite.engines.engine import EngineSettings, Session
from kvsuite.engines.results import EngineView, MemoryPass, Reach, Served, ServeRequest
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import Architecture, architecture_of
from kvsuite.memory_model.formats import MLC_FORMATS, mlc_format
from kvsuite.memory_model.prediction import Part
from kvsuite.meters.clock import ClientClock, Clock
from kvsuite.meters.memory import DriverMeter, peak_resident_set
from kvsuite.models.resolve import resolve_model
from kvsuite.models.smollm2 import cache_root
from kvsuite.options.paths import expanded

from .install import MlcInstall
from .memory_model import MlcMemory, brings_config, point_memory, stored_shape, tokens_per_sequence
from .metrics import between
from .models import Compiled, MlcModels, Overrides
from .server import MlcServer, Settings
from .serving import counts_between, engine_times, refuse_what_hangs, request_times
from .source import short_key

_UNSEEN = "MLC-LLM does not say how many bytes of its pages are in use"
_NO_ALLOCATIONS = "MLC-LLM counts no allocations; memory.reported has its own estimate"
_REFUSAL = (
    "engine mlc runs the design-space suite alone: MLC-LLM returns no losses and takes no cache policies; use "
    "--kv-engine=hf or nano"
)

_SHORT = {"sliding_window_size": "window", "attention_sink_size": "sink"}


@dataclass(frozen=True)
class MlcDevice:
    """A device that torch has no name for: as much of ``torch.device`` as is asked for."""

    type: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class MlcSession(Session):
    """A model for MLC-LLM; each design point gets a library and a server of its own.

    Parameters
    ----------
    case
        Names model, weight format and device.
    install
        The mlc_llm that runs it.
    settings
        Without ``threads`` TVM chooses; decode step and implementation are of other engines and do not reach this one.
    model_lib
        A compiled library that replaces our own, ``None`` for none.
    opt
        What mlc_llm's compiler switches on, in its own words; ``None`` for its default.
    timeout_s, compile_timeout_s
        Deadlines in seconds: of a start and of requests, and of a step of preparation.
    """

    lacks: ClassVar[Mapping[type, str]] = {ScoresWindows: "MLC-LLM returns no losses of a given text"}
    memory_parts: ClassVar[Mapping[Part, str]] = {
        "parameters": "params_bytes",
        "kv_cache": "kvcache_bytes",
        "temporary": "temp_bytes",
    }

    def __init__(
        self,
        case: Case,
        install: MlcInstall,
        settings: EngineSettings,
        *,
        model_lib: str | None = None,
        opt: str | None = None,
        timeout_s: float = 300,
        compile_timeout_s: float = 3600,
    ) -> None:
        super().__init__()
        if case.workload.get("protocol") != "serving":
            raise CaseInvalid(_REFUSAL)
        cache_dir = settings.cache_dir
        self._install, self._device_name = install, case.device
        self._timeout_s, self._threads, self._library = timeout_s, settings.threads, model_lib
        self._opt = opt
        self._root = cache_root(cache_dir) / "mlc"
        self._spec = resolve_model(case.model, cache_dir=cache_dir)
        if opt is not None:
            self._require_takes(opt)
        self._architecture = architecture_of(case.model, cache_dir=cache_dir)
        self._format = mlc_format(_format_of(case, self._architecture.quantization))
        began = time.monotonic()
        self._models: MlcModels | None = None
        if model_lib is not None:
            self._require_library(model_lib)
        elif not brings_config(self._spec):
            self._models = MlcModels(
                self._spec, self._format.name, install, device=case.device, root=self._root,
                deadline_s=compile_timeout_s, seed=settings.seed, cache_dir=cache_dir, opt=opt,
            )  # fmt: skip
        self._load_s = time.monotonic() - began
        self._own_inert = self._inert_axes()
        self._case = case
        self._server: MlcServer | None = None
        self.model = self._facts()
        self.inert = {}
        if settings.implementation != "ring":
            self.inert["impl"] = "the pages of MLC-LLM are the cache; ring and copy are caches of engine hf"
        if settings.attention != "auto":
            self.inert["attention"] = "MLC-LLM attends with its own compiled functions"
        if settings.decode_step != "auto":
            self.inert["decode_step"] = "MLC-LLM decides itself what it captures"

    @property
    def device(self) -> Any:
        kind, _, index = self._device_name.partition(":")
        if kind in ("cpu", "cuda"):
            import torch

            return torch.device(self._device_name)
        return MlcDevice(kind, int(index or 0))

    @property
    def dtype_name(self) -> str:
        return self._format.dtype

    @property
    def tokenizer(self) -> Any:
        # prompts are token ids, and no text is scored
        return None

    @property
    def vocab_size(self) -> int:
        return self._architecture.vocabulary

    def prepare(self, case: Case) -> None:
        self.finish()
        if case.workload.get("protocol") != "serving":
            raise CaseInvalid(_REFUSAL)
        if case.partition is not None:
            raise CaseInvalid("engine mlc has no SM partitions; leave the partition out")
        self._case = case
        self.effective = {
            "device": self._device_name,
            "dtype": self._format.dtype,
            "weight_format": self._format.name,
            "threads": self._threads if case.device_kind == "cpu" else None,
            "mlc_llm": self._install.mlc_llm,
            "tvm": self._install.tvm,
        }
        refuse_what_hangs(case)

    def clock(self, usual: Clock) -> Clock:
        return ClientClock()

    def serve(self, requests: Sequence[ServeRequest], clock: Clock | None = None) -> Served:
        refuse_load(requests, "mlc")
        server = self._up()
        before = server.metrics()
        stamps = clock or ClientClock()
        replies = server.complete(requests, stamps)
        after = server.metrics()
        seconds = stamps.seconds()
        times = [request_times(reply, one.prompt, seconds) for reply, one in zip(replies, requests, strict=True)]
        counts = counts_between(before, after, times)
        return Served(
            [] if clock is None else times, [], counts, texts=[reply.text for reply in replies],
            engine=EngineView(engine_times(replies), before, after),
        )  # fmt: skip

    def engine_metrics(self, served: Sequence[Served]) -> dict[str, float]:
        views = [one.engine for one in served if one.engine is not None]
        return between(views[0].before, views[-1].after)

    def memory(self, requests: Sequence[ServeRequest]) -> MemoryPass:
        self._stop()
        with DriverMeter(self.device).peak() as driver:
            server = self._up()
            self.serve(requests)
        reported: dict[str, int] = dict(server.memory)
        warnings = [] if reported else ["mlc_llm printed no memory estimate"]
        return MemoryPass.unmeasured(
            _NO_ALLOCATIONS, unseen=_UNSEEN, resident=peak_resident_set(server.pid), driver=driver, warnings=warnings,
            reported=reported,
        )  # fmt: skip

    def reach(self, case: Case) -> Reach:
        settings = {name: value for name, value in case.params.items() if name not in self._own_inert}
        settings["tokens_per_sequence"] = tokens_per_sequence(case)
        asked = {"window": int(case.params["window"]) > 0, "sink": int(case.params["sink"]) > 0}
        inert = {axis: reason for axis, reason in self._own_inert.items() if asked.get(axis, True)}
        return Reach(settings, inert)

    def full_kv_bytes(self, tokens: int) -> int:
        return tokens * self._architecture.kv_bytes_per_token(self._format.element_bytes)

    def planned_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> int | None:
        if self._storage_unknown is not None:
            return None
        return requests * self.full_kv_bytes(self._visible(prompt_tokens + new_tokens - 2))

    def step_kv_bytes(self, prompt_tokens: int, new_tokens: int, requests: int = 1) -> float:
        seen = [self._visible(position) for position in range(prompt_tokens, prompt_tokens + new_tokens - 1)]
        return requests * self.full_kv_bytes(sum(seen)) / len(seen)

    def floor_unknown(self) -> str | None:
        if self.device.type not in ("cpu", "cuda"):
            return f"the copy bandwidth of {self.device} cannot be measured by torch"
        if isinstance(self._architecture.weights, str):
            return self._architecture.weights
        return self._storage_unknown

    def planned_unknown(self) -> str:
        return self._storage_unknown or super().planned_unknown()

    @property
    def _storage_unknown(self) -> str | None:
        shape = stored_shape(self._architecture)
        return shape if isinstance(shape, str) else None

    def memory_model(self, architecture: Architecture) -> MlcMemory:
        memory = point_memory(architecture, self._case, writes_config=self._models is not None)
        # only what is compiled can tell; the pass asks when the server is up
        return replace(memory, library_bytes=None if self._server is None else self._server.settings.function_bytes)

    def finish(self) -> None:
        self._stop()

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _up(self) -> MlcServer:
        if self._server is None:
            point = self._case.params
            batch = int(point["batch"])
            slides = "window" not in self._own_inert
            overrides = Overrides(
                context_window_size=int(point["context"]),
                prefill_chunk_size=int(point["prefill_chunk"]),
                max_batch_size=batch,
                sliding_window_size=int(point["window"]) if slides else None,
                attention_sink_size=int(point["sink"]) if slides else None,
            )
            caches = bool(self._case.workload["prefix_caching"])
            self._server = self._start(overrides, batch * tokens_per_sequence(self._case), caches)
            self.effective |= overrides.given() | self._server.limits
            self.effective |= {
                "prefix_caching": caches,
                "start_s": self._server.start_seconds,
                "mlc_opt": None if self._library is not None else self._opt or "O2",
                "own_library": self._server.settings.library is not None,
            }
        return self._server

    def _visible(self, position: int) -> int:
        """Tokens that the query at a position sees: MLC's window counts the sinks."""
        window = -1 if "window" in self._own_inert else int(self._case.params["window"])
        return position + 1 if window <= 0 else min(position + 1, window)

    def _start(self, overrides: Overrides, total_tokens: int, caches: bool) -> MlcServer:
        compiled = self._compiled(overrides)
        environment = {} if self._threads is None else {"TVM_NUM_THREADS": str(self._threads)}
        if compiled.library is None:
            environment["MLC_LLM_HOME"] = str(self._home())
        settings = Settings(
            python=self._install.python,
            model=compiled.model,
            library=compiled.library,
            device=self._device_name,
            overrides={
                **({"opt": self._opt} if compiled.library is None and self._opt is not None else {}),
                "max_num_sequence": overrides.max_batch_size,
                "max_total_seq_length": total_tokens,
                "context_window_size": overrides.context_window_size,
                "prefill_chunk_size": overrides.prefill_chunk_size,
            },
            prefix_cache="radix" if caches else "disable",
            start_s=self._timeout_s,
            request_s=self._timeout_s,
            environment=environment,
            function_bytes=compiled.function_bytes,
        )
        return MlcServer(settings)

    def _compiled(self, overrides: Overrides) -> Compiled:
        if self._models is not None:
            return self._models.compiled(overrides)
        is_folder = Path(self._spec.source).is_dir()
        model = self._spec.source if is_folder else f"HF://{self._spec.source}"
        return Compiled(model, None if self._library is None else Path(self._library))

    def _inert_axes(self) -> dict[str, str]:
        if self._models is not None:
            return {_SHORT[axis]: reason for axis, reason in MlcMemory.of(self._architecture).inert().items()}
        reason = "the runtime takes them from the model's own mlc-chat-config.json, and that is not written here"
        return dict.fromkeys(_SHORT.values(), reason)

    def _home(self) -> Path:
        """Home of mlc_llm for libraries of this version: its own cache knows no versions. Weights are shared by all."""
        home = self._root / f"home-{short_key(dict(self._install.identity))}"
        usual = os.environ.get("MLC_LLM_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlc_llm"
        weights = expanded(usual) / "model_weights"
        for folder in (home, weights):
            folder.mkdir(parents=True, exist_ok=True)
        link = home / "model_weights"
        if not link.exists():
            link.symlink_to(weights)
        return home

    def _require_library(self, path: str) -> None:
        if not Path(path).is_file():
            raise UserError(f"--kv-model-lib={path}: no such file; give a library that mlc_llm compile made")
        if self._spec.kind != "mlc":
            raise UserError(
                f"--kv-model-lib={path}: fits MLC weights only; give their folder or HF:// address as --kv-model, or leave "
                "the library out and it is compiled"
            )

    def _require_takes(self, opt: str) -> None:
        if self._library is not None:
            raise UserError(f"--kv-mlc-opt={opt}: --kv-model-lib is compiled already; leave one of the two out")
        # among the overrides of mlc_llm serve a semicolon begins the next one
        if brings_config(self._spec) and ";" in opt:
            raise UserError(
                f"--kv-mlc-opt={opt}: mlc_llm compiles {self._spec.request} itself when it starts, and takes one word then; "
                "give O0 to O3, or one name with its value"
            )

    def _facts(self) -> dict[str, Any]:
        weights = self._architecture.weights
        return {
            "label": self._spec.label,
            "kind": self._spec.kind,
            "revision": self._spec.revision,
            "notes": [note for note in self._spec.notes if self._spec.kind != "mlc"],
            "parameters": None if isinstance(weights, str) else weights.elements,
            "weights_bytes": None if self._models is None else self._models.weights_bytes,
            "step_weight_bytes": None if isinstance(weights, str) else weights.step_bytes(self._format),
            "trained_length": self._architecture.trained_length,
            "tokenizer_hash": None,
            "load_s": self._load_s,
            "is_dummy": self._spec.is_dummy,
        }


def _format_of(case: Case, own: str | None) -> str:
    asked = case.quantization
    if asked is None:
        raise CaseInvalid(
            "engine mlc: weights as loaded (none) are no format of MLC; give --kv-quantization=q0f16, q0f32 or "
            f"{own or 'q4f16_1'}"
        )
    if asked not in MLC_FORMATS:
        raise CaseInvalid(f"--kv-quantization={asked}: no weight format of MLC; use {', '.join(MLC_FORMATS)}")
    if own is not None and own != asked:
        raise CaseInvalid(
            f"--kv-quantization={asked}: the weights of {case.model} are {own}; give --kv-quantization={own}"
        )
    return asked
