"""A session of the `mlc` engine: one model in one weight format for MLC-LLM, for the design-space suite."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import architecture_of
from kvsuite.memory_model.formats import MLC_FORMATS, mlc_format
from kvsuite.memory_model.mlc import MlcMemory
from kvsuite.models.resolve import resolve_model
from kvsuite.models.smollm2 import cache_root

from .install import MlcInstall
from .models import Compiled, MlcModels, Overrides
from .server import MlcServer, Settings
from .serving import MlcServing
from .source import short_key

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
    seed
        Seed of a dummy model's weights.
    threads
        CPU threads, ``None`` for TVM's own choice.
    cache_dir
        Where converted models lie.
    model_lib
        A compiled library that replaces our own, ``None`` for none.
    timeout_s, compile_timeout_s
        Deadlines in seconds: of a start and of requests, and of a step of preparation.
    decode_step, implementation
        Of other engines: they do not reach this one.
    """

    refusal = (
        "engine mlc runs the design-space suite alone: MLC-LLM returns no losses and takes no cache policies; use "
        "--kv-engine=hf or nano"
    )

    def __init__(
        self,
        case: Case,
        install: MlcInstall,
        *,
        seed: int = 0,
        threads: int | None = None,
        cache_dir: Path | None = None,
        model_lib: str | None = None,
        timeout_s: float = 300,
        compile_timeout_s: float = 3600,
        decode_step: str = "auto",
        implementation: str = "ring",
    ) -> None:
        super().__init__()
        if case.workload.get("protocol") != "serving":
            raise CaseInvalid(self.refusal)
        self._install, self._device_name = install, case.device
        self._timeout_s, self._threads, self._library = timeout_s, threads, model_lib
        self._root = cache_root(cache_dir) / "mlc"
        self._spec = resolve_model(case.model, cache_dir=cache_dir)
        self._architecture = architecture_of(case.model, cache_dir=cache_dir)
        self._format = mlc_format(_format_of(case, self._architecture.quantization))
        began = time.monotonic()
        self._models: MlcModels | None = None
        if model_lib is not None:
            self._require_library(model_lib)
        elif self._spec.kind != "mlc" or Path(self._spec.source).is_dir():
            self._models = MlcModels(
                self._spec, self._format.name, install, device=case.device, root=self._root,
                deadline_s=compile_timeout_s, seed=seed, cache_dir=cache_dir,
            )  # fmt: skip
        self._load_s = time.monotonic() - began
        self._serving: MlcServing | None = None
        self.model = self._facts()
        self.inert = {}
        if implementation != "ring":
            self.inert["impl"] = "the pages of MLC-LLM are the cache; ring and copy are caches of engine hf"
        if decode_step != "auto":
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
            raise CaseInvalid(self.refusal)
        if case.partition is not None:
            raise CaseInvalid("engine mlc has no SM partitions; leave the partition out")
        self.effective = {
            "device": self._device_name,
            "dtype": self._format.dtype,
            "weight_format": self._format.name,
            "threads": self._threads if case.device_kind == "cpu" else None,
            "mlc_llm": self._install.mlc_llm,
            "tvm": self._install.tvm,
        }

    def serving(self, case: Case) -> MlcServing:
        self._serving = MlcServing(
            case, self._architecture, self._format, self._inert_axes(), self._models is not None, self.effective,
            self._start, self.device,
        )  # fmt: skip
        return self._serving

    def finish(self) -> None:
        if self._serving is not None:
            self._serving.stop()
            self._serving = None

    def close(self) -> None:
        self.finish()

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
        weights = Path(usual).expanduser() / "model_weights"
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

    def full_kv_bytes(self, tokens: int) -> int:
        return tokens * self._architecture.kv_bytes_per_token(self._format.element_bytes)


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
