"""Environment: captured once a run, referenced by every record; and the fingerprint that says whose times may be compared."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsuite import __version__
from kvsuite.case import digest

_PACKAGES = (
    "torch", "transformers", "kvpress", "datasets", "accelerate", "bitsandbytes", "numpy", "pytest", "pytest-benchmark",
    "pytest-xdist", "triton", "nvidia-ml-py",
)  # fmt: skip
# an allow-list: other variables may hold secrets
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "MLC_JIT_POLICY", "LD_PRELOAD",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTEST_ADDOPTS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
)  # fmt: skip


def host_facts(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Facts of machine and software that need no accelerator library.

    Parameters
    ----------
    command
        What the user typed, where it is not the command line of this process: a worker of xdist has one that says nothing.
    """
    program, *arguments = command or sys.argv
    return {
        "kvsuite": {"version": __version__} | _commit(Path(__file__).resolve().parents[2]),
        "host": {
            "name": platform.node(),
            "os": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "ram_bytes": _ram_bytes(),
            "container": Path("/.dockerenv").exists() or Path("/run/.containerenv").exists(),
        },
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "command": [Path(program).name, *arguments],
        "working_tree": _commit(Path.cwd()),
    }


def gpu_facts(device: str) -> dict[str, Any]:
    """Name, memory, processors, driver, power and clocks of a CUDA device; ``{}`` for any other.

    The UUID is hashed: it tells two cards apart without being a serial number.
    """
    if not device.startswith("cuda"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.device(device))
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch_cuda": torch.version.cuda,
    }
    return facts | _nvml_facts(torch.device(device))


def machine(environment: dict[str, Any]) -> dict[str, Any]:
    """What decides speed: GPU, driver, power limit, torch and CUDA, OS family, CPU.

    No serial numbers, measured frequencies or free memory: they would make every run its own machine.
    """
    gpu = environment.get("gpu", {})
    return {
        "gpu": {k: gpu.get(k) for k in ("name", "sm_count", "memory_bytes", "driver", "power_limit_w", "torch_cuda")},
        "torch": environment["packages"]["torch"],
        "os": environment["host"]["os"],
        "cpu": environment["host"]["cpu"],
        "cores": environment["host"]["cores"],
    }


def fingerprint(environment: dict[str, Any], *, engine: str, versions: Mapping[str, str]) -> str:
    """Hash of `machine`, and of the engine with the versions of all that computes in it (`Engine.version`)."""
    return digest(machine(environment) | {"engine": [engine, dict(versions)]})


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of those of ``packages`` that are installed here; none is imported."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def _nvml_facts(device: Any) -> dict[str, Any]:
    from .memory import device_uuid

    try:
        import pynvml
    except ImportError:
        return {"driver": None, "driver_reason": "nvidia-ml-py is missing: pip install nvidia-ml-py"}
    try:
        pynvml.nvmlInit()
        uuid = device_uuid(device)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return {
            "uuid": digest(uuid),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "power_limit_w": _asked(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            "temperature_c": _asked(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            "sm_clock_mhz": _asked(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "memory_clock_mhz": _asked(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            "throttle_reasons": _asked(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
            "processes": _asked(lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))),
        }
    except pynvml.NVMLError as error:
        return {"driver": None, "driver_reason": str(error)}


def _asked(query: Any) -> Any:
    # not every card and container answers every question
    try:
        return query()
    except Exception:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None else bool(git("status", "--porcelain", "-uno"))}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
