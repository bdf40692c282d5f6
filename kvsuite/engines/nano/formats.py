"""Cache formats that the `nano` engine stores. Imports no torch."""

from __future__ import annotations

from kvsuite.cache_formats.by_layer import ByLayerFormat
from kvsuite.cache_formats.cache_format import CacheFormat
from kvsuite.cache_formats.cast_format import CastFormat
from kvsuite.cache_formats.chosen_format import HqqFormat, format_of
from kvsuite.case import Case
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.groups import unpaged


def paged_format(case: Case) -> CacheFormat | None:
    """How a case stores keys and values, ``None`` for the model's own dtype.

    Raises
    ------
    CaseInvalid
        If pages cannot hold them so.
    """
    chosen = format_of(case)
    if isinstance(chosen, HqqFormat):
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen}: transformers' own cache is no part of engine nano; use --kv-engine=hf"
        )
    if isinstance(chosen, ByLayerFormat):
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen.label}: engine nano stores all layers in one format; use --kv-engine=hf"
        )
    if isinstance(chosen, CastFormat):
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen}: is a format of engine {chosen.engine} alone; use --kv-engine={chosen.engine}"
        )
    if chosen is not None and (reason := unpaged(chosen)):
        raise CaseInvalid(f"--kv-cache-dtype={chosen} on engine nano: {reason}; use --kv-engine=hf")
    return chosen
