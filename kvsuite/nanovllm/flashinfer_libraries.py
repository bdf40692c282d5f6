"""FlashInfer's libraries of kernels: which ones the pools call for, which of them are built, and building them.

A library is compiled by nvcc for minutes, once on a machine; packages with built ones exist too (``flashinfer-jit-cache``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kvsuite.errors import CaseSkipped
from kvsuite.kernel_builds import BUILDS

from .kv_pool import KVPool

INSTALL = (
    "pip install --no-deps flashinfer-python==0.6.1 apache-tvm-ffi==0.1.13.post3 nvidia-cudnn-frontend, "
    "and pip install einops tabulate ninja"
)
#: widths of heads that FlashInfer has kernels for
HEAD_DIMS = (64, 128, 256)
#: for decode steps of many sequences, and for prompts where there is no ``fa3``
FA2 = "fa2"
#: for prompts on Hopper, which alone has it
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
        raise CaseSkipped(f"FlashInfer is not installed ({error}); {INSTALL}") from error
    return flashinfer


@dataclass(frozen=True)
class Libraries:
    """What FlashInfer has for some pools.

    Parameters
    ----------
    built
        Of ``fa2`` and ``fa3`` those that can be used now.
    missing
        Those that would be used if they were.
    """

    built: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()

    @property
    def prompts(self) -> str | None:
        """The one that is best for prompts, ``None`` without any."""
        return next((name for name in (FA3, FA2) if name in self.built), None)


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
    names = _names(torch.cuda.get_device_capability(pools[0].device))
    try:
        flashinfer_module()
    except CaseSkipped:
        return Libraries(missing=frozenset(names))
    specs = {name: [_specification(name, *shape) for shape in shapes] for name in names}
    waiting = [spec for found in specs.values() for spec in found if not spec.is_compiled]
    if waiting and build:
        _build(waiting)
    built = frozenset(name for name, found in specs.items() if all(spec.is_compiled for spec in found))
    return Libraries(built, frozenset(specs) - built)


def _names(capability: tuple[int, int]) -> tuple[str, ...]:
    """Libraries that are used on devices of a capability."""
    return (FA2, FA3) if capability[0] == 9 else (FA2,)


def built_widths(capability: tuple[int, int]) -> list[int]:
    """Widths of heads for which all libraries of a capability are built in bfloat16. FlashInfer is installed."""
    names = _names(capability)
    return [
        width for width in HEAD_DIMS if all(_specification(name, torch.bfloat16, width).is_compiled for name in names)
    ]


def takes_flashinfer(pool: KVPool) -> bool:
    """Whether FlashInfer attends over a pool where it is there."""
    return pool.group.window is None and not pool.group.places


def _specification(name: str, dtype: torch.dtype, head_dim: int) -> Any:
    """What FlashInfer calls for when `FlashInferAttention` plans a step: prompts and, with ``fa2``, decode steps."""
    from flashinfer.jit import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        gen_batch_prefill_module,
    )

    # dtypes of queries, keys and output; widths of keys and values; positions, window, cap of logits, sums in half precision
    return gen_batch_prefill_module(
        name, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False
    )  # fmt: skip


def _build(specs: Sequence[Any]) -> None:
    BUILDS.say(f"nvcc builds {len(specs)} libraries of FlashInfer, some minutes, once on this machine ...")

    def one(spec: Any) -> None:
        began = time.perf_counter()
        try:
            spec.build(verbose=False)
        except (OSError, RuntimeError) as error:
            # no nvcc, no ninja, or an nvcc that does not know the device; torch's kernels do without
            BUILDS.say(f"FlashInfer could not be built: {' '.join(str(error).split())[:300]}")
            return
        BUILDS.add("flashinfer", spec.name, time.perf_counter() - began)

    with ThreadPoolExecutor(len(specs)) as threads:
        list(threads.map(one, specs))
