"""The `llamacpp` engine: where it runs, its versions, and loading a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.cache_formats.ggml_format import GGML_TYPES, GgmlFormat
from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.engines.serving_plan import ServingPlan
from kvsuite.errors import CaseInvalid, UserError
from kvsuite.memory_model.config import Architecture
from kvsuite.meters.environment import installed_versions
from kvsuite.models.resolve import resolve_model
from kvsuite.options.option import OptionGroup, options_in

from .library import PACKAGE, missing_library
from .memory_model import FULL, LlamacppMemory
from .options import LlamacppOptions

if TYPE_CHECKING:
    from .session import LlamacppSession

_POLICIES = ("streaming_llm", "recent_only")


class LlamacppEngine(Engine):
    """Loads GGUF files with llama.cpp, on the CPU."""

    name: ClassVar[str] = "llamacpp"
    option_group: ClassVar[type[OptionGroup] | None] = LlamacppOptions
    perplexity_bounds: ClassVar[Mapping[str, float]] = {"float32": 3e-3}

    def unavailable(self, device: str) -> str | None:
        if device.partition(":")[0] != "cpu":
            return f"engine {self.name} runs on the CPU alone, not on {device}; use --kv-device=cpu"
        return missing_library()

    def version(self) -> dict[str, str]:
        return installed_versions(PACKAGE, "gguf")

    def default_formats(self, model: str) -> tuple[str, ...]:
        return ("none",)

    def case_params(self) -> dict[str, Any]:
        own = self.options.of(LlamacppOptions)
        chosen = {option.field: option for option in options_in(LlamacppOptions)}
        return {
            name: value
            for name, option in chosen.items()
            if (value := getattr(own, name)) != option.parse(option.default)
        }

    def refuse(self, case: Case) -> None:
        chosen = format_of(case)
        if chosen is not None and not isinstance(chosen, GgmlFormat):
            raise CaseInvalid(
                f"--kv-cache-dtype={chosen.label}: engine {self.name} stores keys and values in llama.cpp's types "
                f"({', '.join(GGML_TYPES)}); use two of them, auto (f16), or --kv-engine=hf"
            )
        if case.quantization is not None:
            raise CaseInvalid(
                f"--kv-quantization={case.quantization}: engine {self.name} computes with the weights of a GGUF file; use "
                "none, and --kv-gguf-type for a checkpoint"
            )
        if case.dtype not in ("float32", "checkpoint"):
            raise CaseInvalid(
                f"--kv-dtype={case.dtype}: llama.cpp computes in float32; leave --kv-dtype out, and give the cache's type with "
                "--kv-cache-dtype, that of a checkpoint's weights with --kv-gguf-type"
            )
        plan = ServingPlan.of(case)
        if plan is not None and (case.policy is not None or plan.lanes == 2):
            raise CaseInvalid(
                f"engine {self.name} keeps whole caches under load, on one lane: baseline, and chunked without compression; "
                "use --kv-engine=nano"
            )
        if case.policy is not None and case.policy not in _POLICIES:
            raise CaseInvalid(
                f"{case.policy} on engine {self.name}: llama.cpp's cache keeps sinks and recent tokens alone "
                f"({', '.join(_POLICIES)}); use --kv-engine=hf"
            )

    def memory_model(self, architecture: Architecture, case: Case) -> LlamacppMemory:
        chosen = format_of(case)
        return self._memory(architecture, case.model, chosen if isinstance(chosen, GgmlFormat) else FULL)

    def predictor(self, architecture: Architecture, given: Mapping[str, Any]) -> LlamacppMemory:
        if architecture.quantization is not None:
            raise UserError(f"--model={given['model']}: MLC weights, which llamacpp cannot load; use --engine mlc")
        return self._memory(architecture, given["model"], FULL)

    def _memory(self, architecture: Architecture, model: str, chosen: GgmlFormat) -> LlamacppMemory:
        has_own = resolve_model(model).kind in ("gguf", "smollm2")
        return LlamacppMemory(architecture, chosen, None if has_own else self.options.of(LlamacppOptions).gguf_type)

    def load(self, case: Case, settings: EngineSettings) -> LlamacppSession:
        from .session import LlamacppSession

        return LlamacppSession(case, settings, self.options.of(LlamacppOptions))
