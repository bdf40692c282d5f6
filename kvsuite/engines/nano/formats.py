"""Cache formats that the `nano` engine stores. Imports no torch."""

from __future__ import annotations

from kvsuite.cache_formats.by_layer import OwnFormat, refused_heads
from kvsuite.cache_formats.cast_format import CastFormat
from kvsuite.cache_formats.chosen_format import HqqFormat, format_of
from kvsuite.cache_formats.ggml_format import GgmlFormat
from kvsuite.case import Case
from kvsuite.errors import CaseInvalid
from kvsuite.models.layers import ModelLayers
from kvsuite.nanovllm.groups import unpaged


def paged_format(case: Case) -> OwnFormat | None:
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
    if isinstance(chosen, GgmlFormat):
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen.label}: is llama.cpp's, which engine nano does not store; use --kv-engine=llamacpp"
        )
    if isinstance(chosen, CastFormat):
        raise CaseInvalid(
            f"--kv-cache-dtype={chosen}: is a format of engine {chosen.engine} alone; use --kv-engine={chosen.engine}"
        )
    if chosen is not None and (reason := unpaged(chosen)):
        raise CaseInvalid(f"--kv-cache-dtype={chosen.label} on engine nano: {reason}; use --kv-engine=hf")
    return chosen


def refused_format(chosen: OwnFormat, of: ModelLayers) -> str | None:
    """Why pages cannot hold keys and values of a model in a format; ``None`` if they can."""
    return unpaged(chosen) or refused_heads(chosen, of)
