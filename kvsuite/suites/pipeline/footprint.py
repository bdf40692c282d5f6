"""Memory of a case of the pipeline suite before it runs: weights, and the pool that it names."""

from __future__ import annotations

from dataclasses import replace

from kvsuite.cache_formats.by_layer import kv_bytes
from kvsuite.cache_formats.chosen_format import HqqFormat, format_of
from kvsuite.case import Case
from kvsuite.compression import get_policy
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid
from kvsuite.options.resolve import Options
from kvsuite.suites.footprint import Footprint, KnownModel, known_model
from kvsuite.workloads.serving_workload import LONG

from .cases import longest_request, workload_of


def pool_footprint(case: Case, options: Options) -> Footprint:
    """No less than the weights, the pool of the case's plan, and what is made of a prompt layer by layer beside it."""
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
    return replace(known.weights, bytes=known.weights.weight_bytes + pool + _waiting_bytes(case, plan, known))


def _waiting_bytes(case: Case, plan: ServingPlan, known: KnownModel) -> float:
    """Keys and values that are made of one prompt some layers after each token, and wait for the others beside the pool.

    0 where it is not known how long the prompts are, or whether one is merged before its request is over.
    """
    of, load = known.architecture, workload_of(case)
    if plan.layers_per_step is None or isinstance(of.cache, str) or load.name != LONG or load.image is not None:
        return 0
    prompt, output = longest_request(case)
    assert case.policy is not None
    made = get_policy(case.policy, **case.policy_params).size_after(prompt)
    # a token for each layer is the most that the layers take
    return of.kv_bytes(made, known.format.element_bytes) if made < prompt and output > of.layers else 0
