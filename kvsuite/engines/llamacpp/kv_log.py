"""What llama.cpp's log says of a context: the types of its cache that were really taken, its cells and bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .library import LogLine

MIB = 1 << 20
_CACHE = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers, +\d+/(\d+) seqs\), K \((\w+)\): +[\d.]+ MiB, V \((\w+)\)"
)
_FLASH = re.compile(r"flash_attn += (enabled|disabled)|Flash Attention (?:not supported, set to )?(enabled|disabled)")
_BUFFER = re.compile(r"(\w+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class CacheSaid:
    """A cache as the log tells it.

    Parameters
    ----------
    keys, values
        Names of their types.
    cells
        Of a sequence.
    layers, sequences
        That have them.
    mib
        Of keys and values, rounded to two decimals.
    """

    keys: str
    values: str
    cells: int
    layers: int
    sequences: int
    mib: float


def caches_said(lines: Sequence[LogLine]) -> list[CacheSaid]:
    """The caches of a context: one, or one for layers with a window and one for the others."""
    found = [match for line in lines if (match := _CACHE.search(line.text))]
    return [
        CacheSaid(
            keys=match[5], values=match[6], cells=int(match[2]), layers=int(match[3]), sequences=int(match[4]),
            mib=float(match[1]),
        )
        for match in found
    ]  # fmt: skip


def flash_attention_said(lines: Sequence[LogLine]) -> str | None:
    """``enabled`` or ``disabled``, ``None`` where the log does not say."""
    found = [match[1] or match[2] for line in lines if (match := _FLASH.search(line.text))]
    return found[-1] if found else None


def buffers_said(lines: Sequence[LogLine]) -> dict[str, int]:
    """Bytes of its buffers by their kinds, added up: ``model``, ``KV``, ``compute``, ``output``; rounded to 0.01 MiB."""
    found: dict[str, int] = {}
    for line in lines:
        if match := _BUFFER.search(line.text):
            found[match[2]] = found.get(match[2], 0) + round(float(match[3]) * MIB)
    return found
