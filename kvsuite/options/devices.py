"""Devices by name, without loading torch: what ``--kv-device=auto`` means here."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from pathlib import Path

DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


def resolve_device(request: str) -> str:
    """Resolve ``auto`` to the best device that the installed torch is built for; a bare ``cuda`` is ``cuda:0``.

    Whether a device that was asked for by name is there is the engine's question: it never becomes another one.
    """
    if request == "auto":
        request = _best()
    kind = request.partition(":")[0]
    return f"{kind}:0" if request == kind and kind not in ("cpu", "mps") else request


def _best() -> str:
    if _torch_build_has_cuda() and any(Path(file).exists() for file in DRIVER_FILES):
        # an empty list hides every GPU
        return "cpu" if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") else "cuda:0"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "mps"
    return "cpu"


def _torch_build_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.exists() and re.search(r"^cuda\s*(:[^=]*)?=\s*['\"]", version.read_text(), re.MULTILINE) is not None
