"""The columns of a perplexity CSV: their order, what a field of each may hold, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

ORIGINAL_COLUMNS = (
    "mlc_model",
    "hf_model",
    "device",
    "max_length",
    "stride",
    "split",
    "load_in_4bit",
    "load_in_8bit",
    "fake_q3bit",
    "ppl",
)
COLUMNS = (
    *ORIGINAL_COLUMNS,
    "dataset",
    "text_sha256",
    "num_tokens",
    "num_targets",
    "dtype",
    "seconds",
    "nll_mean",
    "protocol",
    "perplexity_se",
    "ppl_original_formula",
    "bos",
    "quantization",
    "run_id",
    "schema_version",
    "started_utc",
    "host",
    "kvsuite_version",
    "torch_version",
    "transformers_version",
    "model_revision",
    "tokenizer_hash",
    "dataset_revision",
    "case_key",
)
SCHEMA_VERSION = 1
#: column of a weight format that the original has a flag for
FLAGS = {"4bit": "load_in_4bit", "8bit": "load_in_8bit", "fake_q3": "fake_q3bit"}

_INTEGERS = {"max_length", "stride", *FLAGS.values(), "num_tokens", "num_targets", "schema_version"}
_FLOATS = {"ppl", "seconds", "nll_mean", "perplexity_se", "ppl_original_formula"}
_REQUIRED = {"hf_model", "device", "max_length", "stride", *FLAGS.values(), "ppl"}
# exp of a mean of losses >= 0; log-softmax in float32 rounds
_LEAST = {"ppl": 1 - 1e-6, "ppl_original_formula": 1 - 1e-6, "perplexity_se": 0.0, "seconds": 0.0}
_SHOWN = 60


def parse_field(name: str, field: str) -> Any:
    """Read a field.

    Whole numbers may carry ``.0`` and flags may be ``True`` and ``False``, as pandas saves them again.

    Returns
    -------
    Any
        A str, int or float; ``None`` for an empty field.

    Raises
    ------
    ValueError
        Naming the column and the field, if a result cannot have it.
    """
    if not field:
        if name in _REQUIRED:
            raise ValueError(f"{name} is empty")
        return None
    if name in _INTEGERS:
        return _whole(name, field)
    return _number(name, field) if name in _FLOATS else field


def format_field(name: str, value: Any) -> str:
    """Write a value; ``None`` is an empty field, numbers of numpy are plain numbers, floats keep every digit."""
    if value is None:
        return ""
    if name in _INTEGERS:
        return str(int(value))
    return repr(float(value)) if name in _FLOATS else str(value)


def header_fault(header: Sequence[str]) -> str | None:
    """What keeps a header from being that of a perplexity CSV, ``None`` if nothing does. The order is free."""
    if not any(header):
        return "is empty"
    unknown = [name for name in header if name not in COLUMNS]
    missing = [name for name in ORIGINAL_COLUMNS if name not in header]
    if missing:
        also = f", and has {_listed(unknown)}" if unknown else ""
        return f"is not a perplexity CSV: it lacks the column{_s(missing)} {_listed(missing)}{also}"
    if unknown:
        return f"has the unknown column{_s(unknown)} {_listed(unknown)}"
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    return f"has the column{_s(twice)} {_listed(twice)} more than once" if twice else None


def _whole(name: str, field: str) -> int:
    if name in FLAGS.values() and field in ("True", "False"):
        return int(field == "True")
    number = _number(name, field)
    if not number.is_integer():
        raise ValueError(f"{name} is {_shown(field)}, no whole number")
    whole = int(number)
    if name in FLAGS.values() and whole not in (0, 1):
        raise ValueError(f"{name} is {whole}, neither 0 nor 1")
    if name == "schema_version" and whole != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {whole}, this kvsuite reads {SCHEMA_VERSION}")
    if name not in FLAGS.values() and whole < 1:
        raise ValueError(f"{name} is {whole}, at least 1 is possible")
    return whole


def _number(name: str, field: str) -> float:
    try:
        number = float(field)
    except ValueError:
        raise ValueError(f"{name} is {_shown(field)}, no number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {field}")
    if number < _LEAST.get(name, number):
        raise ValueError(f"{name} is {field}, at least {round(_LEAST[name])} is possible")
    return number


def _shown(field: str) -> str:
    return repr(field if len(field) <= _SHOWN else field[:_SHOWN] + "…")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_shown(name) if name not in COLUMNS else name for name in names)


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) > 1 else ""
