"""The `hf` engine: where it runs, and loading a session."""

from __future__ import annotations

from typing import ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.engines.loading import torch_cannot_use

from .session import HfSession

_TORCH_DEVICES = ("cpu", "cuda", "mps")


class HfEngine(Engine):
    """Loads transformers models."""

    name: ClassVar[str] = "hf"

    def unavailable(self, device: str) -> str | None:
        return torch_cannot_use(self.name, device, _TORCH_DEVICES)

    def load(self, case: Case, settings: EngineSettings) -> HfSession:
        return HfSession(case, settings)
