"""Memory of a case of the pipeline suite before it runs: weights, and the pool that it names."""

from __future__ import annotations

from dataclasses import replace

from kvsuite.cache_formats.by_layer import kv_bytes
from kvsuite.cache_formats.chosen_format import HqqFormat, format_of
from kvsuite.case import Case
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid
from kvsuite.options.resolve import Options
from kvsuite.suites.footprint import Footprint, known_model


def pool_footprint(case: Case, options: Options) -> Footprint:
    """No less than the weights and the pool of the case's plan."""
    known, plan = known_model(case, options), ServingPlan.of(case)
    if isinstance(known, Footprint) or plan is None:
        return known if isinstance(known, Footprint) else known.weights
    if plan.pool_bytes is not None:
        pool: float = plan.pool_bytes
    elif isinstance(known.architecture.cache, str):
        return replace(known.weights, reason=known.weights.reason or known.architecture.cache)
    else:
        tokens = (plan.pool_blocks or 0) * BLOCK_TOKENS
        chosen, of = format_of(case), known.architecture
        if isinstance(chosen, HqqFormat):
            return known.weights
        try:
            pool = (
                of.kv_bytes(tokens, known.format.element_bytes)
                if chosen is None
                else kv_bytes(
                    chosen, known.architecture.cache, [tokens] * of.layers, tokens, known.format.element_bytes
                )
            )
        except CaseInvalid as error:
            return replace(known.weights, reason=known.weights.reason or str(error))
    return replace(known.weights, bytes=known.weights.weight_bytes + pool)
