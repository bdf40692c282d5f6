"""The `nano` engine: where it runs, its versions, and loading a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.prediction import Predictor
from kvsuite.meters.environment import installed_versions

from .memory_model import NanoMemory

if TYPE_CHECKING:
    from .session import NanoSession

_DEVICES = ("cpu", "cuda")
_COMPUTING = ("torch", "transformers", "flashinfer-python", "triton")


class NanoEngine(Engine):
    """Serves transformers models from paged keys and values (`kvsuite.nanovllm`)."""

    name: ClassVar[str] = "nano"

    def unavailable(self, device: str) -> str | None:
        try:
            from kvsuite.engines.loading import torch_cannot_use
        except ImportError as error:
            return f"engine {self.name}: {error}; pip install kvsuite"
        return torch_cannot_use(self.name, device, _DEVICES)

    def version(self) -> dict[str, str]:
        return installed_versions(*_COMPUTING)

    def memory_model(self, architecture: Architecture, case: Case) -> Predictor | None:
        # a checkpoint says its own dtype only when it is loaded
        dtype = "bfloat16" if case.dtype == "checkpoint" else case.dtype
        return NanoMemory(architecture, dtype, case.device_kind)

    def load(self, case: Case, settings: EngineSettings) -> NanoSession:
        from .session import NanoSession

        return NanoSession(case, settings)
