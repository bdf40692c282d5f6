"""How vLLM calls the formats of `kvsuite.cache_formats` that it has."""

from __future__ import annotations

from kvsuite.cache_formats.cache_format import AUTO, CacheFormat, SideFormat
from kvsuite.cache_formats.cast_format import CastFormat
from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.case import Case
from kvsuite.errors import CaseInvalid

# a cast without scales: that is what vLLM does where a checkpoint brings none
_E4M3 = "fp8_e4m3"


def stored_format(case: Case) -> str:
    """vLLM's ``kv_cache_dtype`` of a case.

    Raises
    ------
    CaseInvalid
        If vLLM does not have the case's format.
    """
    chosen = format_of(case)
    if chosen is None:
        return AUTO
    if isinstance(chosen, CastFormat):
        return chosen.name
    side = SideFormat(_E4M3)
    if chosen == CacheFormat(side, side):
        return _E4M3
    raise CaseInvalid(
        f"--kv-cache-dtype={chosen}: engine vllm stores keys and values as auto, fp8_e4m3 (fp8) or fp8_e5m2, both alike; use "
        "one of these, or --kv-engine=hf"
    )


def element_bytes(stored: str, own: int) -> int:
    """Bytes of an element in a format of vLLM's; ``own`` are those of the model's dtype."""
    return own if stored == AUTO else 1
