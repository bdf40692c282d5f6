"""What an option is: its name, default and help, and how its text is parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu|vulkan|metal|rocm|opencl)(:[0-9]+)?")
DEVICES = "cpu, cuda[:N], mps, xpu[:N], vulkan[:N], metal[:N], rocm[:N], opencl[:N], auto"


@dataclass(frozen=True)
class Option:
    """One option.

    Parameters
    ----------
    name
        Without the prefix: ``num-samples`` is ``--kv-num-samples`` and ``kv_num_samples`` in the ini file.
    parse
        Text to value; raises ValueError or UserError.
    default
        Text, as a user would write it.
    help
        One or two sentences with an example.
    original
        Default of the original program under ``--kv-preset=original``, where it differs.
    aliases
        Other names.
    example
        Value that error messages show, where the default says too little.
    """

    name: str
    parse: Callable[[str], Any]
    default: str
    help: str
    original: str | None = None
    aliases: tuple[str, ...] = ()
    example: str | None = None

    @property
    def dest(self) -> str:
        """Attribute and ini name: ``kv_num_samples``."""
        return "kv_" + self.name.replace("-", "_")


def _int(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError(f"must be at least {minimum}")
        return value

    return parse


def _list(item: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        values = tuple(item(part) for part in parts)
        if not values:
            raise ValueError("is empty")
        repeated = [part for at, part in enumerate(parts) if values[at] in values[:at]]
        if repeated:
            raise ValueError(f"names the same value twice, {repeated[0]}")
        return values

    return parse


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError("must lie in (0, 1]")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError("must lie between 0 and 1")
    return value


def _window(text: str) -> int:
    """A sliding window as in ``--kv-space``; -1 for none."""
    return -1 if text.lower() in ("off", "-1") else _int(1)(text)


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"use {', '.join(choices)}")
        return text

    return parse


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("use true or false")


def _layers(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() in ("", "none") else _list(_int(0))(text)


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"unknown device; use {DEVICES}")
    return text


def _threads(text: str) -> int | None:
    return None if text == "auto" else _int(1)(text)


def _dtype(text: str) -> str | None:
    from kvsuite.models.load import parse_dtype

    return None if text == "auto" else parse_dtype(text)


def _schedule(text: str) -> str:
    from kvsuite.compression.base import Schedule

    return Schedule(text).name


def _formats(text: str) -> tuple[str, ...] | None:
    if text == "auto":
        return None
    return _list(_format)(text)


def _format(text: str) -> str:
    from kvsuite.quantization.registry import QUANTIZATIONS

    if text not in QUANTIZATIONS:
        raise ValueError(f"unknown weight format {text}; use {', '.join(QUANTIZATIONS)}")
    return text


def _reference(text: str) -> str | None:
    if "," in text:
        raise ValueError("one weight format is wanted, not a list")
    return None if text == "off" else _format(text)


def _all_or(text: str) -> int | None:
    if text == "all":
        return None
    try:
        int(text)
    except ValueError:
        raise ValueError("neither a whole number nor all") from None
    return _int(2)(text)


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()


def _label(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty, and a label is wanted")
    return text.strip()
