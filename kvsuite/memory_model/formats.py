"""Weight formats as bytes: kvsuite's own, and all that MLC names."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.errors import UserError
from kvsuite.quantization.formats import CAST_FORMATS, GROUP_FORMATS, GroupFormat
from kvsuite.quantization.registry import NONE

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# mlc_llm/quantization/quantization.py: formats that kvsuite itself does not compute, laid out like those that it does
_MLC_GROUPS = GROUP_FORMATS | {
    "q3f16_0": GroupFormat(3, 40, "float16", transposed=True),
    "q4bf16_0": GroupFormat(4, 32, "bfloat16", transposed=True),
    "q4bf16_1": GroupFormat(4, 32, "bfloat16"),
}
_MLC_CASTS = CAST_FORMATS | {"q0bf16": "bfloat16"}
# layouts of their own, by the dtype that keys and values have
_MLC_OTHERS = {
    "q4f16_autoawq": "float16",
    "q4f16_ft": "float16",
    "e5m2_e5m2_f16": "float16",
    "e4m3_e4m3_f16": "float16",
    "e4m3_e4m3_f16_max_calibrate": "float16",
    "fp8_e4m3fn_bf16_block_scale": "bfloat16",
    "fp8_e4m3fn_bf16_block_scale_static_activation": "bfloat16",
}
MLC_FORMATS = (*_MLC_CASTS, *_MLC_GROUPS, *_MLC_OTHERS)
NANO_FORMATS = (NONE, *CAST_FORMATS, *GROUP_FORMATS)


@dataclass(frozen=True)
class WeightFormat:
    """What a format means in bytes.

    Parameters
    ----------
    name
        Of the format.
    dtype
        What it computes in, and what keys and values are stored in.
    group
        Its packing, ``None`` for dense weights.
    unknown
        Why the bytes of its weights are not known, ``None`` if they are.
    """

    name: str
    dtype: str
    group: GroupFormat | None = None
    unknown: str | None = None

    @property
    def element_bytes(self) -> int:
        """Bytes of an element that is not packed, and of a key's or value's."""
        return ELEMENT_BYTES[self.dtype]


def mlc_format(name: str) -> WeightFormat:
    """A format by its MLC name.

    Raises
    ------
    UserError
        If MLC has no such format.
    """
    if name in _MLC_GROUPS:
        return WeightFormat(name, _MLC_GROUPS[name].dtype, _MLC_GROUPS[name])
    if name in _MLC_CASTS:
        return WeightFormat(name, _MLC_CASTS[name])
    if name in _MLC_OTHERS:
        return WeightFormat(name, _MLC_OTHERS[name], unknown=f"{name} has a weight layout that is not modelled")
    raise UserError(f"--kv-quantization={name}: no weight format of MLC; choose from {', '.join(MLC_FORMATS)}")


def nano_format(name: str, dtype: str) -> WeightFormat:
    """A format of the `nano` engine.

    Parameters
    ----------
    name
        Of the format; ``none`` leaves the weights as loaded.
    dtype
        Of the loaded weights, for ``none``: ``float32``, ``float16`` or ``bfloat16``.

    Raises
    ------
    UserError
        If the format or the dtype is not known, or the format's bytes are not in closed form here.
    """
    if dtype not in ELEMENT_BYTES:
        raise UserError(f"--kv-dtype={dtype}: unknown dtype; choose from {', '.join(ELEMENT_BYTES)}")
    if name == NONE:
        return WeightFormat(NONE, dtype)
    if name not in NANO_FORMATS:
        raise UserError(f"--kv-quantization={name}: not predicted for nano; choose from {', '.join(NANO_FORMATS)}")
    return mlc_format(name)
