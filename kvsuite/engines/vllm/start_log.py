"""What vLLM prints when it starts: seconds of loading, compiling and capturing, which it tells nowhere else."""

from __future__ import annotations

import re
from typing import Any

_CAPTURED = re.compile(r"Graph capturing finished in (\d+) secs, took (-?[\d.]+) GiB")
_COMPILED = re.compile(r"torch\.compile took ([\d.]+) s in total")
_LOADED = re.compile(r"Model loading took [\d.]+ GiB(?: memory)? and ([\d.]+) seconds")
_NEW = re.compile(r"Compiling a graph for compile range")
_FOUND = re.compile(r"Directly load the compiled graph\(s\) for compile")
_GIB = 1 << 30


def started(printed: str) -> dict[str, Any]:
    """Facts of one start.

    Parameters
    ----------
    printed
        What vLLM printed in it; of several cards each prints its own lines, and the slowest counts.

    Returns
    -------
    dict[str, Any]
        ``weights_s``, ``compile_s``, ``compile_cache`` (``cold``: something was compiled; ``warm``: all was found in vLLM's
        cache), ``capture_s`` (whole seconds, as vLLM prints it) and ``captured_bytes``: those that it printed.
    """
    found: dict[str, Any] = {}
    if loaded := _LOADED.findall(printed):
        found["weights_s"] = max(map(float, loaded))
    if compiled := _COMPILED.findall(printed):
        found["compile_s"] = max(map(float, compiled))
    if _NEW.search(printed) or _FOUND.search(printed):
        found["compile_cache"] = "cold" if _NEW.search(printed) else "warm"
    if captured := _CAPTURED.findall(printed):
        found["capture_s"] = max(int(seconds) for seconds, _ in captured)
        found["captured_bytes"] = sum(round(float(size) * _GIB) for _, size in captured)
    return found
