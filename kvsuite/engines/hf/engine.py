"""The `hf` engine: where it runs, its versions, and loading a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.meters.environment import installed_versions

if TYPE_CHECKING:
    from .session import HfSession

_DEVICES = ("cpu", "cuda", "mps")
_COMPUTING = ("torch", "transformers")


class HfEngine(Engine):
    """Loads transformers models."""

    name: ClassVar[str] = "hf"
    is_optional: ClassVar[bool] = False
    stores_cache_formats: ClassVar[bool] = True
    stores_formats_by_layer: ClassVar[bool] = True

    def unavailable(self, device: str) -> str | None:
        try:
            from kvsuite.engines.loading import torch_cannot_use
        except ImportError as error:
            return f"engine {self.name}: {error}; pip install kvsuite"
        return torch_cannot_use(self.name, device, _DEVICES)

    def version(self) -> dict[str, str]:
        return installed_versions(*_COMPUTING)

    def import_libraries(self) -> None:
        from kvsuite.models.load import import_libraries

        import_libraries()

    def load(self, case: Case, settings: EngineSettings) -> HfSession:
        from .session import HfSession

        return HfSession(case, settings)
