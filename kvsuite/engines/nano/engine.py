"""The `nano` engine: where it runs, and loading a session."""

from __future__ import annotations

from typing import ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.engines.loading import torch_cannot_use

from .session import NanoSession


class NanoEngine(Engine):
    """Serves transformers models from paged keys and values (`kvsuite.nanovllm`)."""

    name: ClassVar[str] = "nano"

    def unavailable(self, device: str) -> str | None:
        return torch_cannot_use(self.name, device, ("cpu", "cuda"))

    def load(self, case: Case, settings: EngineSettings) -> NanoSession:
        return NanoSession(case, settings)
