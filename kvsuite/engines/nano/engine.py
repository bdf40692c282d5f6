"""The `nano` engine: where it runs, its versions, and loading a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.errors import UserError
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.prediction import Predictor
from kvsuite.meters.environment import installed_versions

from .formats import paged_format
from .memory_model import NanoMemory

if TYPE_CHECKING:
    from .session import NanoSession

_DEVICES = ("cpu", "cuda")
_COMPUTING = ("torch", "transformers", "flashinfer-python", "triton")


class NanoEngine(Engine):
    """Serves transformers models from paged keys and values (`kvsuite.nanovllm`)."""

    name: ClassVar[str] = "nano"
    stores_cache_formats: ClassVar[bool] = True
    stores_formats_by_layer: ClassVar[bool] = True
    perplexity_bounds: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 3e-3, "float16": 1e-3}
    predictor_options: ClassVar[frozenset[str]] = frozenset({"dtype", "device"})

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

    def refuse(self, case: Case) -> None:
        # what no model has on pages comes before what this one lacks
        paged_format(case)
        super().refuse(case)

    def memory_model(self, architecture: Architecture, case: Case) -> Predictor | None:
        # a checkpoint says its own dtype only when it is loaded
        dtype = "bfloat16" if case.dtype == "checkpoint" else case.dtype
        return NanoMemory(architecture, dtype, case.device_kind, cache_format=paged_format(case))

    def predictor(self, architecture: Architecture, given: Mapping[str, Any]) -> Predictor:
        if architecture.quantization is not None:
            raise UserError(
                f"--model={given['model']}: MLC weights, which nano cannot load; use --engine mlc or another model"
            )
        device = given["device"] or "cuda"
        return NanoMemory(architecture, given["dtype"] or ("float32" if device == "cpu" else "bfloat16"), device)

    def load(self, case: Case, settings: EngineSettings) -> NanoSession:
        from .session import NanoSession

        return NanoSession(case, settings)
