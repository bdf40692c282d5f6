"""Serving plans on the `nano` engine: the runtime limits of a plan, and what of a plan it cannot do."""

from __future__ import annotations

from kvsuite.compression.base import Policy
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid
from kvsuite.nanovllm.compression_stage import require_prompt_only
from kvsuite.nanovllm.layer_by_layer import require_layer_by_layer
from kvsuite.nanovllm.limits import Limits

from .runtime import BLOCK_SIZE


def plan_limits(plan: ServingPlan) -> Limits:
    """Limits of a plan: the pool that it names, whatever else fits the device."""
    return Limits(
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.step_tokens,
        block_size=BLOCK_SIZE,
        num_blocks=None if plan.pool_blocks is None else plan.pool_blocks * BLOCK_TOKENS // BLOCK_SIZE,
        pool_bytes=plan.pool_bytes,
        prefix_caching=plan.prefix_caching,
        prefill_first=plan.prompts_first,
    )


def refuse_plan(plan: ServingPlan, policy: Policy | None) -> None:
    """Refuse what the runtime does not do.

    Parameters
    ----------
    plan
        Of the case.
    policy
        Of the case.

    Raises
    ------
    CaseInvalid
        With the reason: nothing else is served under the name of what was asked.
    """
    if (policy is None) != (plan.stage == "none"):
        raise CaseInvalid(
            f"stage={plan.stage}: a policy is there if and only if it has a stage to work in; give both or none"
        )
    if plan.controller is not None and policy is None:
        raise CaseInvalid(f"controller={plan.controller}: it decides how prompts are compressed; give a policy")
    require_layer_by_layer(plan.layers_per_step, policy)
    if plan.stage == "async":
        require_prompt_only(policy)
