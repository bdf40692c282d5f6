"""The `vllm` engine: where it runs, its versions, what it refuses, and loading a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.case import Case
from kvsuite.engines.engine import Engine, EngineSettings
from kvsuite.errors import CaseInvalid, CaseSkipped, UserError
from kvsuite.memory_model.config import Architecture
from kvsuite.memory_model.formats import ELEMENT_BYTES
from kvsuite.options.option import OptionGroup
from kvsuite.options.resolve import Options
from kvsuite.quantization.registry import NONE

from .install import VllmInstall, find_install
from .memory_model import VllmMemory
from .options import VllmOptions
from .stored_format import element_bytes, stored_format

if TYPE_CHECKING:
    from .session import VllmSession


class VllmEngine(Engine):
    """Serves models by vLLM, in a process of its own."""

    name: ClassVar[str] = "vllm"
    option_group: ClassVar[type[OptionGroup] | None] = VllmOptions
    stores_cache_formats: ClassVar[bool] = True
    perplexity_bounds: ClassVar[Mapping[str, float]] = {"float32": 3e-3, "bfloat16": 3e-3, "float16": 3e-3}
    predictor_options: ClassVar[frozenset[str]] = frozenset({"dtype", "device"})

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self._own = self.options.of(VllmOptions)
        self._found: VllmInstall | CaseSkipped | None = None

    def unavailable(self, device: str) -> str | None:
        try:
            return self._install().missing_device(device)
        except CaseSkipped as skip:
            return str(skip)

    def version(self) -> dict[str, str]:
        try:
            return self._install().versions
        except CaseSkipped:
            return {}

    def refuse(self, case: Case) -> None:
        super().refuse(case)
        stored_format(case)
        if case.policy is not None:
            raise CaseInvalid(
                f"engine vllm keeps the whole cache and takes no {case.policy}; use --kv-engine=hf or nano"
            )
        if case.quantization not in (None, NONE):
            raise CaseInvalid(
                f"--kv-quantization={case.quantization}: engine vllm takes weights as they are; use "
                "--kv-quantization=none, or --kv-engine=hf or nano"
            )
        if case.partition is not None:
            raise CaseInvalid("engine vllm has no SM partitions; use --kv-engine=nano")
        if case.device_kind == "cpu" and self._own.vllm_tensor_parallel_size > 1:
            raise CaseInvalid(
                f"--kv-vllm-tensor-parallel-size={self._own.vllm_tensor_parallel_size}: parts a model between cards, and a "
                "CPU is one; use 1"
            )

    def default_formats(self, model: str) -> tuple[str, ...]:
        return (NONE,)

    def case_params(self) -> dict[str, Any]:
        own = self._own
        chosen = {
            "block_size": own.vllm_block_size,
            "vllm_pool_bytes": own.vllm_pool_bytes,
            "attention_backend": own.vllm_attention_backend,
            "max_capture_size": own.vllm_max_capture_size,
            "tensor_parallel_size": None if own.vllm_tensor_parallel_size == 1 else own.vllm_tensor_parallel_size,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    def memory_model(self, architecture: Architecture, case: Case) -> VllmMemory:
        from .memory_model import BLOCK_TOKENS

        # a checkpoint says its own dtype only when it is loaded
        dtype = "bfloat16" if case.dtype == "checkpoint" else case.dtype
        return VllmMemory(
            architecture,
            dtype,
            element_bytes(stored_format(case), ELEMENT_BYTES[dtype]),
            self._own.vllm_block_size or BLOCK_TOKENS.get(case.device_kind, BLOCK_TOKENS["cuda"]),
            self._own.vllm_tensor_parallel_size,
            self._own.vllm_pool_bytes,
        )

    def predictor(self, architecture: Architecture, given: Mapping[str, Any]) -> VllmMemory:
        from .memory_model import BLOCK_TOKENS

        if architecture.quantization is not None:
            raise UserError(f"--model={given['model']}: MLC weights, which vllm cannot load; use --engine mlc")
        device = given["device"] or "cuda"
        dtype = given["dtype"] or ("float32" if device == "cpu" else "bfloat16")
        return VllmMemory(architecture, dtype, ELEMENT_BYTES[dtype], BLOCK_TOKENS.get(device, BLOCK_TOKENS["cuda"]))

    def load(self, case: Case, settings: EngineSettings) -> VllmSession:
        from .session import VllmSession

        return VllmSession(case, self._install(), settings, self._own)

    def _install(self) -> VllmInstall:
        """The vLLM there is, looked for once."""
        if self._found is None:
            try:
                self._found = find_install(self._own.vllm_python)
            except CaseSkipped as skip:
                self._found = skip
        if isinstance(self._found, CaseSkipped):
            raise self._found
        return self._found
