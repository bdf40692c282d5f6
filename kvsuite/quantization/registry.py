"""The weight formats by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.option import Option, option_of
from kvsuite.options.resolve import Options

from .formats import CAST_FORMATS, GROUP_FORMATS

NONE = "none"
FAKE = "fake_q3"
_GROUP_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Quantization:
    """A weight format.

    Parameters
    ----------
    name
        What ``--kv-quantization`` takes.
    quality_only
        Whether its memory and speed mean nothing, because the weights stay dense.
    compute_dtype
        The dtype it prescribes, ``None`` if it computes in that of the loaded model.
    """

    name: str
    quality_only: bool = False
    compute_dtype: str | None = None


QUANTIZATIONS: dict[str, Quantization] = {
    item.name: item
    for item in (
        Quantization(NONE),
        Quantization(FAKE, quality_only=True),
        Quantization("4bit"),
        Quantization("8bit"),
        *(Quantization(name, compute_dtype=dtype) for name, dtype in CAST_FORMATS.items()),
        *(Quantization(name, compute_dtype=spec.dtype) for name, spec in GROUP_FORMATS.items()),
    )
}
_LABELS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def quantization(name: str) -> Quantization:
    """Look a format up.

    Raises
    ------
    UserError
        If the name is not known.
    """
    try:
        return QUANTIZATIONS[name]
    except KeyError:
        raise UserError(
            f"--kv-quantization={name}: unknown weight format; choose from {', '.join(QUANTIZATIONS)}"
        ) from None


def selected_formats(options: Options) -> tuple[str, ...] | None:
    """The weight formats of ``--kv-quantization``, ``None`` if each suite takes its own.

    Raises
    ------
    UserError
        If one of them is not known.
    """
    chosen = options.of(CommonOptions).quantization
    if chosen is not None:
        require_known(option_of(CommonOptions, "quantization"), chosen)
    return chosen


def require_known(option: Option, formats: Sequence[str]) -> None:
    """Refuse the value of an option that names a weight format which is not known.

    Raises
    ------
    UserError
        Naming the option, its value and the formats.
    """
    for name in formats:
        if name not in QUANTIZATIONS:
            detail = f"unknown weight format {name}; use {', '.join(QUANTIZATIONS)}"
            raise option.refused(",".join(formats), detail)


def label(name: str, dtype: str) -> str:
    """What tables and figures show: the name, or the loaded dtype (``fp32``, ``bf16``, ``fp16``) for ``none``."""
    return _LABELS.get(dtype, dtype) if quantization(name).name == NONE else name


def unavailable(name: str, device: str) -> str | None:
    """Why a format cannot run on ``device`` here, ``None`` if it can.

    Raises
    ------
    UserError
        If the name is not known.
    """
    import importlib.util

    quantization(name)
    kind = device.partition(":")[0]
    if name in ("4bit", "8bit"):
        from .bitsandbytes import unavailable as bitsandbytes_unavailable

        return bitsandbytes_unavailable(name, device)
    if name in GROUP_FORMATS:
        if kind not in _GROUP_DEVICES:
            return f"{name} runs on {' and '.join(_GROUP_DEVICES)}, not on {device}; use none or q0f16"
        if kind == "cuda" and importlib.util.find_spec("triton") is None:
            return f"{name} on {device} needs triton, which is not installed; run: pip install triton"
    return None


def dtype_of(options: Options, device: str, chosen: str) -> str:
    """Dtype of a case: what its weight format prescribes, else ``--kv-dtype``, else float32 on a CPU."""
    prescribed = quantization(chosen).compute_dtype
    default = "float32" if device.partition(":")[0] == "cpu" else "checkpoint"
    return prescribed or options.of(CommonOptions).dtype or default
