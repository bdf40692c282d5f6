"""Processor, free memory, disk, and whether the folders that kvsuite writes into can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil

from kvsuite.meters.environment import host_facts
from kvsuite.models.smollm2 import cache_root
from kvsuite.options.paths import expanded

from .findings import Finding

GIB = 2**30
_LOW_MEMORY, _LOW_DISK = 4 * GIB, 2 * GIB
_CGROUP = Path("/sys/fs/cgroup")


def machine_findings(report_dir: Path) -> list[Finding]:
    """Lines about the host, without loading torch."""
    return [_processor(), _load(), _memory(), _folder("report folder", report_dir, "--kv-report-dir"),
            _folder("cache folder", cache_root(), "KVSUITE_CACHE")]  # fmt: skip


def _processor() -> Finding:
    host = host_facts()["host"]
    found = f"{host['cpu']}, {host['cores']} usable cores, {host['os']} {host['release']}"
    quota = _words(_CGROUP / "cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[0]) / int(quota[1]) < host["cores"]:
        share = int(quota[0]) / int(quota[1])
        return Finding(
            "processor", "attention", f"{found}; the container may use {share:.1f} of them", "times come in jerks"
        )
    governor = _words(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    if governor and governor != ["performance"]:
        return Finding(
            "processor",
            "attention",
            f"{found}; clocks governed by {governor[0]!r}",
            "cpupower frequency-set -g performance",
        )
    return Finding("processor", "ok", found)


def _load() -> Finding:
    loads = os.getloadavg()
    cores = os.cpu_count() or 1
    found = "load " + ", ".join(f"{load:.2f}" for load in loads) + " over 1, 5 and 15 minutes"
    if loads[0] > 0.5 * cores:
        return Finding("load", "attention", f"{found}, on {cores} cores", "other programs run here: times will vary")
    return Finding("load", "ok", found)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    free, found = memory.available, f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    limit, used = _words(_CGROUP / "memory.max"), _words(_CGROUP / "memory.current")
    if limit and used and limit[0].isdigit() and int(limit[0]) < memory.total:
        free = min(free, int(limit[0]) - int(used[0]))
        found += f", the container may take {(int(limit[0]) - int(used[0])) / GIB:.1f} GiB more"
    if free < _LOW_MEMORY:
        return Finding("memory", "attention", found, "large models will not fit; free some")
    return Finding("memory", "ok", found)


def _folder(part: str, folder: Path, option: str) -> Finding:
    """Whether files can be made in ``folder``, or in the nearest one above it that is there, and how much room there is."""
    folder = expanded(folder).absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if _is_there(path))
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(
            part, "attention", f"{folder}: cannot be written ({error.strerror})", f"choose another one with {option}"
        )
    found = f"{folder}: can be {'written' if there == folder else 'made'}, {free / GIB:.1f} GiB free"
    return Finding(part, "attention", found, "make room") if free < _LOW_DISK else Finding(part, "ok", found)


def _is_there(path: Path) -> bool:
    # what Path.exists does with a folder that may not be searched differs from Python to Python
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
