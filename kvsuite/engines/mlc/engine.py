"""The `mlc` engine: where it runs, its versions, and loading a session."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.errors import CaseSkipped, UserError
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.design_point import Check
from kvsuite.memory_model.prediction import Predictor
from kvsuite.models.resolve import resolve_model
from kvsuite.options.option import OptionGroup
from kvsuite.options.paths import expanded
from kvsuite.options.resolve import Options

from .install import MlcInstall, find_install, missing_device
from .memory_model import MlcMemory, brings_config, point_memory
from .options import MlcOptions
from .point_rules import chunk_within_context

if TYPE_CHECKING:
    from .session import MlcSession

_FORMATS = ("q4f16_1",)
# MLC's own names end so: Llama-3-8B-Instruct-q4f16_1-MLC
_NAME = re.compile(r"-([eq]\d\w+)-MLC$")
#: kinds of devices that engines on torch have nothing for
_ONLY_HERE = ("vulkan", "metal", "rocm", "opencl")


class MlcEngine(Engine):
    """Serves models that MLC-LLM compiled, in processes of their own."""

    name: ClassVar[str] = "mlc"
    option_group: ClassVar[type[OptionGroup] | None] = MlcOptions
    predictor_options: ClassVar[frozenset[str]] = frozenset({"json_prefill_chunk", "total_tokens"})
    point_rules: ClassVar[Mapping[str, Check]] = {"chunk-within-context": chunk_within_context}

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._own = self.options.of(MlcOptions)
        self._found: MlcInstall | CaseSkipped | None = None

    def unavailable(self, device: str) -> str | None:
        try:
            return missing_device(self._install(), device)
        except CaseSkipped as skip:
            return str(skip)

    def version(self) -> dict[str, str]:
        try:
            # a source build has the same version for ever, so its library is part of what it is
            return {name: found for name, found in self._install().identity.items() if found is not None}
        except CaseSkipped:
            return {}

    def predictor(self, architecture: Architecture, given: Mapping[str, Any]) -> Predictor:
        chunk = given["json_prefill_chunk"]
        if chunk is not None and chunk < 1:
            raise UserError(f"--json-prefill-chunk={chunk}: must be at least 1")
        return MlcMemory.of(architecture, chunk, per_sequence=given["total_tokens"] == "batch")

    def is_preferred(self, device_kind: str) -> bool:
        return device_kind in _ONLY_HERE or (device_kind == "cuda" and _is_here(self._own.mlc_python))

    def default_formats(self, model: str) -> tuple[str, ...]:
        config = expanded(model) / "mlc-chat-config.json"
        try:
            return (str(json.loads(config.read_text(encoding="utf-8"))["quantization"]),)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            named = _NAME.search(model)
            return _FORMATS if named is None else (named[1],)

    def case_params(self) -> dict[str, Any]:
        given = {"model_lib": self._own.model_lib, "mlc_opt": self._own.mlc_opt}
        return {name: value for name, value in given.items() if value is not None}

    def memory_model(self, architecture: Architecture, case: Case) -> Predictor | None:
        spec = resolve_model(case.model, cache_dir=EngineSettings.of(self.options).cache_dir)
        own = self._own.model_lib is not None or brings_config(spec)
        return point_memory(architecture, case, writes_config=not own)

    def load(self, case: Case, settings: EngineSettings) -> MlcSession:
        from .session import MlcSession

        own = self._own
        return MlcSession(
            case, self._install(), settings, model_lib=own.model_lib, opt=own.mlc_opt, timeout_s=own.mlc_timeout,
            compile_timeout_s=own.mlc_compile_timeout,
        )  # fmt: skip

    def _install(self) -> MlcInstall:
        """The mlc_llm there is, looked for once: that takes a process, and seconds."""
        if self._found is None:
            try:
                self._found = find_install(self._own.mlc_python)
            except CaseSkipped as skip:
                self._found = skip
        if isinstance(self._found, CaseSkipped):
            raise self._found
        return self._found


@functools.cache
def _is_here(python: str | None) -> bool:
    return python is not None or importlib.util.find_spec("mlc_llm") is not None
