"""Dtypes by name."""

from __future__ import annotations

from kvsuite.errors import UserError

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}
_CANONICAL = ("float32", "float16", "bfloat16")


def parse_dtype(name: str) -> str:
    """Return the canonical name of a dtype: ``float32``, ``float16`` or ``bfloat16``.

    Raises
    ------
    UserError
        If the name is not known.
    """
    canonical = _DTYPES.get(name.lower(), name.lower())
    if canonical not in _CANONICAL:
        raise UserError(f"--kv-dtype={name}: unknown dtype; choose float32, float16 or bfloat16 (fp32, fp16, bf16)")
    return canonical
