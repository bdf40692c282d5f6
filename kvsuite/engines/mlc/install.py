"""Which mlc_llm there is: its Python, its versions, its devices. Asked in processes of their own; nothing is imported here."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvsuite.engines.engine_process import EngineFailed, run_step
from kvsuite.errors import CaseSkipped

INSTALL = "install the wheels for your device as https://mlc.ai/wheels says (PyPI has placeholders only)"
#: what MLC runs on, by its own names
DEVICES = ("cuda", "vulkan", "metal", "rocm", "opencl", "cpu")
# loading CUDA, torch and TVM takes seconds, on a busy machine more
_DEADLINE_S = 180.0
_MARK = "kvsuite-mlc:"
# a source build has the same version for ever, so its library is part of what it is
_PROBE = f"""
import hashlib, importlib.metadata as metadata, json
from pathlib import Path
def version(module, *packages):
    for package in packages:
        try:
            found = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        # another installation of the package may stand behind the one that was imported
        if Path(found.locate_file("")).resolve() == Path(module.__file__).resolve().parents[1]:
            return found.version
    return getattr(module, "__version__", "unknown")
import mlc_llm, tvm
folders = [Path(mlc_llm.__file__).parent]
path = getattr(getattr(mlc_llm, "base", None), "_LIB_PATH", None)
library = None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
found = {{"mlc_llm": version(mlc_llm, "mlc-llm"), "tvm": version(tvm, "apache-tvm", "mlc-ai"), "library": library}}
print("\\n{_MARK}" + json.dumps(found))
"""


@dataclass(frozen=True)
class MlcInstall:
    """An installed mlc_llm.

    Parameters
    ----------
    python
        The interpreter that has it.
    mlc_llm, tvm
        Versions.
    library
        Start of the SHA-256 of its compiled library, ``None`` if that was not to be found.
    """

    python: str
    mlc_llm: str
    tvm: str
    library: str | None = None

    @property
    def identity(self) -> dict[str, str | None]:
        """What a converted or compiled model depends on."""
        return {"mlc_llm": self.mlc_llm, "tvm": self.tvm, "library": self.library}


def find_install(python: str | None) -> MlcInstall:
    """The mlc_llm of an interpreter, by default this one.

    Raises
    ------
    CaseSkipped
        If it has none, or one that does not import.
    """
    chosen = python or sys.executable
    if python is None and importlib.util.find_spec("mlc_llm") is None:
        raise CaseSkipped(
            f"engine mlc: no mlc_llm in {sys.executable}; {INSTALL}, or name another environment's interpreter with "
            "--kv-mlc-python"
        )
    try:
        found = json.loads(_ask(chosen, ["-c", _PROBE], _MARK, "importing mlc_llm"))
    except (EngineFailed, MemoryError, OSError) as error:
        mend = INSTALL if python is None else f"{INSTALL}, or give another --kv-mlc-python"
        raise CaseSkipped(f"engine mlc: {chosen} has no mlc_llm that works; {mend}. {error}") from error
    return MlcInstall(chosen, **found)


def missing_device(install: MlcInstall, device: str) -> str | None:
    """Why mlc_llm cannot use a device here, ``None`` if it can."""
    kind, _, index = device.partition(":")
    if kind not in DEVICES:
        mend = " (Apple's GPUs are metal:0 there)" if kind == "mps" else ""
        return f"engine mlc cannot use {device}: MLC knows {', '.join(DEVICES)}{mend}; give one of them as --kv-device"
    try:
        found = _ask(install.python, ["-m", "mlc_llm.cli.check_device", kind], "check_device:", "mlc_llm check_device")
    except (EngineFailed, MemoryError) as error:
        return f"engine mlc: whether there is a {kind} device could not be found out: {error}"
    indices = [part for part in found.split(",") if part]
    # every CPU is the same device to MLC
    if indices and (kind == "cpu" or (index or "0") in indices):
        return None
    known = ", ".join(f"{kind}:{one}" for one in indices) or f"no {kind} device at all"
    return (
        f"engine mlc cannot use {device}: mlc_llm {install.mlc_llm} finds {known} here; take the wheels for your device from "
        "https://mlc.ai/wheels, or give another --kv-device"
    )


def _ask(python: str, arguments: list[str], mark: str, what: str) -> str:
    """The rest of the line that begins with ``mark``."""
    with tempfile.TemporaryDirectory(prefix="kvsuite-mlc-") as folder:
        printed = run_step(what, [python, *arguments], log=Path(folder) / "log", deadline_s=_DEADLINE_S)
    lines = [line.removeprefix(mark).strip() for line in printed.splitlines() if line.startswith(mark)]
    if not lines:
        raise EngineFailed(f"{what} did not answer")
    return lines[-1]
