"""FlashInfer's libraries of kernels: which ones the pools call for, which of them are built, and building them.

A library is compiled by nvcc for minutes, once on a machine; packages with built ones exist too (``flashinfer-jit-cache``).
FlashInfer lets ninja look at every other library before it loads it, and build it anew where a source, a header or a flag has
changed, so a library counts as built only where ninja would do nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kvsuite.errors import CaseSkipped
from kvsuite.kernel_builds import BUILDS, FLASHINFER_INSTALL

from .kv_pool import KVPool

#: widths of heads that FlashInfer has kernels for
HEAD_DIMS = (64, 128, 256)
#: for prompts: ``fa3`` on Hopper, which alone has it, else ``fa2``
FA2 = "fa2"
FA3 = "fa3"


def flashinfer_module() -> Any:
    """Import FlashInfer.

    Raises
    ------
    CaseSkipped
        If it is not installed.
    """
    try:
        import flashinfer  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise CaseSkipped(f"FlashInfer is not installed ({error}); {FLASHINFER_INSTALL}") from error
    return flashinfer


@dataclass(frozen=True)
class Libraries:
    """What FlashInfer has for the prompts of some pools.

    Parameters
    ----------
    prompts
        ``fa2`` or ``fa3`` if it can be used now, ``None`` if not.
    missing
        The one that would be used if it could.
    """

    prompts: str | None = None
    missing: str | None = None


def libraries_for(pools: Sequence[KVPool], *, build: bool) -> Libraries:
    """Look which libraries there are for pools on CUDA, in bfloat16 or float16.

    Parameters
    ----------
    pools
        Only those without a window whose keys are stored rotated are attended to by FlashInfer.
    build
        Whether those that are missing are built now.
    """
    shapes = sorted({(pool.dtype, pool.group.head_dim) for pool in pools if takes_flashinfer(pool)}, key=str)
    if not shapes:
        return Libraries()
    name = _name(torch.cuda.get_device_capability(pools[0].device))
    try:
        flashinfer_module()
    except CaseSkipped:
        return Libraries(missing=name)
    specs = [_specification(name, *shape) for shape in shapes]
    _watch(type(specs[0]))
    waiting = [spec for spec in specs if not is_usable(spec)]
    if waiting and build:
        _build(waiting)
        waiting = [spec for spec in waiting if not is_usable(spec)]
    return Libraries(missing=name) if waiting else Libraries(name)


def _name(capability: tuple[int, int]) -> str:
    """The library that is used on devices of a capability."""
    return FA3 if capability[0] == 9 else FA2


def built_widths(capability: tuple[int, int]) -> list[int]:
    """Widths of heads for which the library of a capability is built in bfloat16. FlashInfer is installed.

    Writes nothing: no source is generated.
    """
    from flashinfer.jit import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        JitSpec,
        get_batch_prefill_uri,
    )

    def found(width: int) -> bool:
        uri = get_batch_prefill_uri(*_parameters(_name(capability), torch.bfloat16, width))
        return is_usable(JitSpec(uri, [], None, None, None, None))

    return [width for width in HEAD_DIMS if found(width)]


def is_usable(spec: Any) -> bool:
    """Whether FlashInfer would load a library as it is: one of a package, or one that ninja has nothing to do for."""
    if spec.is_aot:
        return True
    if not spec.is_compiled or os.environ.get("FLASHINFER_DISABLE_JIT") or shutil.which("ninja") is None:
        return False
    folder = str(spec.ninja_path.parent)
    command = ["ninja", "-n", "-C", folder, "-f", str(spec.ninja_path)]
    asked = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return asked.returncode == 0 and "no work to do" in asked.stdout


def takes_flashinfer(pool: KVPool) -> bool:
    """Whether FlashInfer attends over a pool where it is there."""
    return pool.group.window is None and not pool.group.places


def _specification(name: str, dtype: torch.dtype, head_dim: int) -> Any:
    """What FlashInfer calls for when `KernelAttention` plans the prompts of a step."""
    from flashinfer.jit import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        gen_batch_prefill_module,
    )

    return gen_batch_prefill_module(*_parameters(name, dtype, head_dim))


def _parameters(name: str, dtype: torch.dtype, head_dim: int) -> tuple[Any, ...]:
    # dtypes of queries, keys and output; widths of keys and values; positions, window, cap of logits, sums in half precision
    return name, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False


def _watch(kind: Any) -> None:
    """From now on note what libraries of this class build, whoever asked for it."""
    build = kind.build
    if build.__module__ == __name__:
        return

    def noted(spec: Any, *given: Any, **options: Any) -> None:
        began, before = time.perf_counter(), _written(spec)
        build(spec, *given, **options)
        if _written(spec) != before:
            BUILDS.add("flashinfer", spec.name, time.perf_counter() - began)

    kind.build = noted


def _written(spec: Any) -> int | None:
    """When the library was linked, in ns, ``None`` without one."""
    try:
        written: int = spec.jit_library_path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    return written


def _build(specs: Sequence[Any]) -> None:
    BUILDS.say(f"nvcc builds {len(specs)} libraries of FlashInfer, some minutes, once on this machine ...")

    def one(spec: Any) -> None:
        try:
            spec.build(verbose=False)
        except (OSError, RuntimeError) as error:
            # no nvcc, no ninja, or an nvcc that does not know the device; torch's kernels do without
            BUILDS.say(f"FlashInfer could not be built: {' '.join(str(error).split())[:300]}")

    with ThreadPoolExecutor(len(specs)) as threads:
        list(threads.map(one, specs))
