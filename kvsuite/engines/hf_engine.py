"""The `hf` engine: where it runs, and loading a session."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from kvsuite.case import Case

from .base import Engine
from .hf import HfSession

_TORCH_DEVICES = ("cpu", "cuda", "mps")


class HfEngine(Engine):
    """Loads transformers models."""

    name: ClassVar[str] = "hf"

    def unavailable(self, device: str) -> str | None:
        kind, _, index = device.partition(":")
        if kind not in _TORCH_DEVICES:
            return f"engine hf cannot use {device}: it runs where torch does ({', '.join(_TORCH_DEVICES)})"
        if kind == "cuda":
            if not torch.cuda.is_available():
                return (
                    f"engine hf cannot use {device}: this torch {torch.__version__} sees no CUDA device; install a CUDA "
                    "build of torch (make bench TORCH_INDEX=<wheel index of a CUDA build>) or use --kv-device=cpu"
                )
            if int(index or 0) >= torch.cuda.device_count():
                return (
                    f"engine hf cannot use {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
                )
        if kind == "mps" and not torch.backends.mps.is_available():
            return f"engine hf cannot use {device}: this torch has no MPS; use --kv-device=cpu"
        return None

    def load(self, case: Case, **options: Any) -> HfSession:
        return HfSession(case, **options)
