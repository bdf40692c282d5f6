"""Kernels that this process had to build: which, how long that took, and a line that says what is waited for.

What a machine has built once it finds again, so this is about first uses. Imports neither torch nor triton.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

#: of FlashInfer, whose own requirements would replace torch
FLASHINFER_INSTALL = (
    "pip install --no-deps flashinfer-python==0.6.1 apache-tvm-ffi==0.1.13.post3 nvidia-cudnn-frontend, "
    "and pip install einops tabulate ninja"
)
_PREPARE = "python -m kvsuite doctor --prepare"


def prepare_line(model: str, device: str, dtype: str) -> str:
    """The command that builds kernels ahead for runs of a model, given as for ``--kv-model`` and so on."""
    return f"{_PREPARE} --kv-model={shlex.quote(model)} --kv-device={shlex.quote(device)} --kv-dtype={dtype}"


def mend_line(missing: str, model: str, device: str, dtype: str) -> str:
    """What has ``missing`` kernels, as ``effective.kernels`` lists them, on this machine: FlashInfer first where it is not."""
    line = prepare_line(model, device, dtype)
    if "flashinfer" in missing and importlib.util.find_spec("flashinfer") is None:
        return f"{FLASHINFER_INSTALL}; then {line}"
    return line


@dataclass(frozen=True)
class KernelBuild:
    """One kernel, or one library of kernels.

    Parameters
    ----------
    by
        What built it: ``triton``, ``flashinfer``.
    name
        Its name there.
    seconds
        What it took. Builds may run side by side.
    """

    by: str
    name: str
    seconds: float


def _to_stderr(line: str) -> None:
    print(f"kvsuite: {line}", file=sys.stderr, flush=True)


@dataclass
class KernelBuilds:
    """What was built since the process began; there is one of them, `BUILDS`.

    Parameters
    ----------
    done
        Every build, in the order in which they ended.
    say
        Takes a line about what is waited for; ``False`` says that nobody was shown it.
    """

    done: list[KernelBuild] = field(default_factory=list)
    say: Callable[[str], bool | None] = _to_stderr
    _watching: bool = False
    _said: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, by: str, name: str, seconds: float) -> None:
        """Note a build."""
        with self._lock:
            self.done.append(KernelBuild(by, name, seconds))

    def once(self, line: str) -> None:
        """Say a line, if it has not been said yet."""
        with self._lock:
            is_new = line not in self._said
            self._said.add(line)
        if is_new and self.say(line) is False:
            with self._lock:
                self._said.discard(line)

    def watch_triton(self) -> None:
        """From now on note what Triton compiles; nothing where it is not installed."""
        with self._lock:
            if self._watching:
                return
            self._watching = True
        try:
            from triton import knobs  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError:
            return
        before = knobs.compilation.listener

        def compiled(*, src: Any, cache_hit: bool, times: Any, **others: Any) -> None:
            if not cache_hit:
                self.add("triton", str(getattr(src, "name", "kernel")), times.total / 1e6)
            if before is not None:
                before(src=src, cache_hit=cache_hit, times=times, **others)

        knobs.compilation.listener = compiled

    @contextmanager
    def telling(self, say: Callable[[str], bool | None]) -> Iterator[None]:
        """Let lines go elsewhere inside the block."""
        before, self.say = self.say, say
        try:
            yield
        finally:
            self.say = before


#: of this process
BUILDS = KernelBuilds()
