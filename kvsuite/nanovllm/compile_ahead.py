"""Triton's kernels compiled side by side, before the first of them is launched.

One after another they take most of a second each. A step that runs inside `compiling_ahead` launches nothing: every launch
becomes a compilation in a thread (Triton's compiler lets other threads run), and the block ends when all are done. What such a
step computes means nothing. A kernel that cannot be compiled says so where it is launched.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvsuite.kernel_builds import BUILDS

_MOST_THREADS = 16


@contextmanager
def compiling_ahead() -> Iterator[bool]:
    """Compile what this thread launches inside the block.

    Yields whether that is so. It is not with releases of triton that do not compile beside; then the block had better be
    empty, and kernels are compiled as they come.
    """
    try:
        from triton.runtime import _async_compile, jit  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        yield False
        return
    before, began = len(BUILDS.done), time.perf_counter()
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with (
        ThreadPoolExecutor(threads) as pool,
        # a kernel that fails here is compiled again where it is launched, and fails there
        _async_compile.AsyncCompileMode(pool, ignore_errors=True),
        _launching_nothing(jit.JITFunction),
    ):
        yield True
    if built := sum(one.by == "triton" for one in BUILDS.done[before:]):
        seconds = time.perf_counter() - began
        BUILDS.say(f"Triton compiled {built} kernels in {seconds:.1f} s; later processes find them")


def _kind(argument: Any) -> tuple[Any, ...]:
    """What of an argument Triton compiles for."""
    if isinstance(argument, Tensor):
        return (argument.dtype, argument.data_ptr() % 16 == 0)
    if isinstance(argument, int):
        return (type(argument), argument == 1, argument % 16 == 0, argument >> 31 == 0)
    return (type(argument),)


@contextmanager
def _launching_nothing(function: Any) -> Iterator[None]:
    """Let ``kernel[grid](...)`` compile and not launch, in this thread."""
    own, launcher = threading.get_ident(), function.__getitem__
    seen: set[tuple[Any, ...]] = set()

    def compiled(kernel: Any, grid: Any) -> Callable[..., Any]:
        if threading.get_ident() != own:
            launch: Callable[..., Any] = launcher(kernel, grid)
            return launch

        def compile_once(*given: Any, **options: Any) -> None:
            # every layer launches the same ones
            kind = (id(kernel), *map(_kind, given), repr(options))
            if kind not in seen:
                seen.add(kind)
                kernel.warmup(*given, grid=grid, **options)

        return compile_once

    function.__getitem__ = compiled
    try:
        yield
    finally:
        # the launcher is inherited
        del function.__getitem__
