"""The `mlc` engine: where it runs, its versions, and loading a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.errors import CaseSkipped
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.design_point import Check
from kvsuite.memory_model.prediction import Predictor
from kvsuite.models.resolve import resolve_model
from kvsuite.options.option import OptionGroup
from kvsuite.options.resolve import Options

from .install import MlcInstall, find_install, missing_device
from .memory_model import brings_config, point_memory
from .options import MlcOptions
from .point_rules import chunk_within_context

if TYPE_CHECKING:
    from .session import MlcSession


class MlcEngine(Engine):
    """Serves models that MLC-LLM compiled, in processes of their own."""

    name: ClassVar[str] = "mlc"
    option_group: ClassVar[type[OptionGroup] | None] = MlcOptions
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

    def memory_model(self, architecture: Architecture, case: Case) -> Predictor | None:
        spec = resolve_model(case.model, cache_dir=EngineSettings.of(self.options).cache_dir)
        own = self._own.model_lib is not None or brings_config(spec)
        return point_memory(architecture, case, writes_config=not own)

    def load(self, case: Case, settings: EngineSettings) -> MlcSession:
        from .session import MlcSession

        own = self._own
        return MlcSession(
            case, self._install(), settings, model_lib=own.model_lib, timeout_s=own.mlc_timeout,
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
