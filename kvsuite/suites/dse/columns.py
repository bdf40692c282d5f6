"""The columns of the two design-space CSVs: their order, what a field of each may hold, and how it is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.case import model_tag

AXES = (
    "context_window_size",
    "prefill_chunk_size",
    "max_batch_size",
    "sliding_window_size",
    "attention_sink_size",
)
#: what names a point in both files, by the original's columns and in its order
KEY = ("model", "device", *AXES, "num_runs", "max_tokens")
SCHEMA_VERSION = 1

_SETTING = ("engine", "quantization", "dtype", "status", "reason", "inert_axes")
_PROVENANCE = (
    "kvsuite_run_id",
    "case_key",
    "schema_version",
    "started_utc",
    "host",
    "device_name",
    "driver",
    "kvsuite_version",
    "torch_version",
    "git_commit",
    "model_revision",
    "seed",
)


@dataclass(frozen=True)
class Table:
    """One of the two files.

    Parameters
    ----------
    kind
        ``"results"`` (a row for every run of a point) or ``"metrics"`` (a row for every metric of a point).
    original
        The original program's columns in its order; every file has them.
    added
        Ours, to the right of them.
    required
        Columns whose fields are never empty.
    """

    kind: str
    original: tuple[str, ...]
    added: tuple[str, ...]
    required: frozenset[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns in the order in which kvsuite writes them."""
        return self.original + self.added

    @property
    def prefix(self) -> str:
        """What stands before the tag in a file's name."""
        return f"kv_cache_dse_{self.kind}_"


RESULTS = Table(
    "results",
    (
        *KEY,
        "run_id",
        "time_s",
        "approx_chars",
        "gpu_mem_total_mb",
        "gpu_mem_params_mb",
        "gpu_mem_kvcache_mb",
        "gpu_mem_temp_mb",
    ),
    (
        *_SETTING,
        "mem_predicted_total_mb",
        "mem_predicted_params_mb",
        "mem_predicted_kvcache_mb",
        "mem_predicted_temp_mb",
        "mem_measured_peak_mb",
        "mem_measured_params_mb",
        "mem_measured_kvcache_mb",
        "kv_exact_mb",
        "ttft_s",
        "ttft_cached_s",
        "tpot_s",
        "prefill_tok_s",
        "decode_tok_s",
        "tpot_floor_s",
        "floor_share",
        "perplexity",
        "perplexity_se",
        "prompt_tokens",
        "prefill_tokens_computed",
        "completion_tokens",
        *_PROVENANCE,
    ),
    frozenset({*KEY, "run_id"}),
)
METRICS = Table(
    "metrics",
    (*KEY, "metric_name", "metric_value"),
    (*_SETTING, "unit", "samples", "smallest", "largest", *_PROVENANCE),
    frozenset({*KEY, "metric_name"}),
)
TABLES = (RESULTS, METRICS)

#: smallest value of a whole number; -1 is "off" where it is the least
_WHOLE = {
    **dict.fromkeys((*AXES, "num_runs", "max_tokens", "samples", "schema_version"), 1),
    "sliding_window_size": -1,
    "attention_sink_size": 0,
    "run_id": 0,
    "approx_chars": 0,
    "prompt_tokens": 0,
    "prefill_tokens_computed": 0,
    "completion_tokens": 0,
    "seed": 0,
}
_SIGNED = {"metric_value", "smallest", "largest"}
_FLOATS = _SIGNED | {
    name for name in RESULTS.columns if name.endswith(("_mb", "_tok_s")) or name in ("time_s", "floor_share")
} | {"ttft_s", "ttft_cached_s", "tpot_s", "tpot_floor_s", "perplexity", "perplexity_se"}  # fmt: skip
_POSITIVE = {"time_s"}
_JSON = {"inert_axes"}
_SHOWN = 60


def series_tag(model: str, quantization: str | None) -> str:
    """The tag of a model in a weight format; MLC's names carry the format already."""
    tag = model_tag(model)
    if not quantization or re.search(rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9_])", tag):
        return tag
    return f"{tag}-{model_tag(quantization)}"


def parse_field(table: Table, name: str, field: str) -> Any:
    """Read a field.

    Whole numbers may carry ``.0``, as pandas saves them again. A ``metric_value`` that is no finite number becomes ``None``:
    the engine prints ``nan`` for a rate of nothing.

    Returns
    -------
    Any
        A str, int, float, or dict (``inert_axes``: reason by axis); ``None`` for an empty field.

    Raises
    ------
    ValueError
        Naming the column and the field, if a result cannot have it.
    """
    if not field:
        if name in table.required:
            raise ValueError(f"{name} is empty")
        return None
    if name in _WHOLE:
        return _whole(name, field)
    if name in _JSON:
        return _reasons(name, field)
    return _number(name, field) if name in _FLOATS else field


def format_field(name: str, value: Any) -> str:
    """Write a value; ``None`` is an empty field, numbers of numpy are plain numbers, floats keep every digit."""
    if value is None:
        return ""
    if name in _WHOLE:
        return str(int(value))
    if name in _JSON:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")) if value else ""
        # what would be written out is escaped as JSON, which reads it back
        return text if text.isprintable() else json.dumps(value, sort_keys=True, separators=(",", ":"))
    if name not in _FLOATS:
        return str(value)
    # the original writes whole numbers of the engine without a fraction
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else repr(float(value))


def table_of(header: Sequence[str]) -> Table | None:
    """The table that a header is of, ``None`` if it is neither's. The order is free."""
    return next((table for table in TABLES if set(table.original) <= set(header)), None)


def header_fault(header: Sequence[str]) -> str | None:
    """What keeps a header from being one of the two tables', ``None`` if nothing does. Further columns are no fault."""
    if not any(header):
        return "is empty"
    if table_of(header) is None:
        nearest = METRICS if {"metric_name", "metric_value"} & set(header) else RESULTS
        missing = [name for name in nearest.original if name not in header]
        return f"is no design-space CSV: it lacks the column{_s(missing)} {', '.join(missing)}"
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    return f"has the column{_s(twice)} {', '.join(map(_shown, twice))} more than once" if twice else None


def _whole(name: str, field: str) -> int:
    number = _number(name, field)
    if number is None or not float(number).is_integer():
        raise ValueError(f"{name} is {_shown(field)}, no whole number")
    whole = int(number)
    if name == "schema_version" and whole != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {whole}, this kvsuite reads {SCHEMA_VERSION}")
    if whole < _WHOLE[name]:
        raise ValueError(f"{name} is {whole}, at least {_WHOLE[name]} is possible")
    return whole


def _number(name: str, field: str) -> int | float | None:
    try:
        number = int(field) if re.fullmatch(r"-?\d{1,18}", field) else float(field)
    except ValueError:
        raise ValueError(f"{name} is {_shown(field)}, no number") from None
    if not math.isfinite(number):
        if name == "metric_value":
            return None
        raise ValueError(f"{name} is {field}")
    if name in _FLOATS - _SIGNED and (number < 0 or (name in _POSITIVE and not number)):
        raise ValueError(f"{name} is {field}, {'more than' if name in _POSITIVE else 'at least'} 0 is possible")
    return number if name in _SIGNED or name in _WHOLE else float(number)


def _reasons(name: str, field: str) -> dict[str, str]:
    try:
        found = json.loads(field)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(reason, str) for reason in found.values()):
        raise ValueError(f"{name} is {_shown(field)}, no JSON object of axes and reasons")
    return found


def _shown(field: str) -> str:
    return repr(field if len(field) <= _SHOWN else field[:_SHOWN] + "…")


def _s(names: Sequence[str]) -> str:
    return "s" if len(names) > 1 else ""
