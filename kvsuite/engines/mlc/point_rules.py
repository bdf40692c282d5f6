"""What MLC-LLM asks of a design point beside the rules of every engine."""

from __future__ import annotations

from kvsuite.memory_model.design_point import DesignPoint


def chunk_within_context(point: DesignPoint) -> str | None:
    """A prefill step of MLC-LLM feeds no more tokens than a sequence has."""
    chunk, context = point.prefill_chunk_size, point.context_window_size
    return f"prefill_chunk_size={chunk} is more than context_window_size={context}" if chunk > context else None
