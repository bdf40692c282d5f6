"""What vLLM is told of a case: its limits, and the memory of its pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.results import Reach
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.errors import CaseInvalid

#: prompt tokens of a step where a case does not say it: losses of a whole step's rows are made at once
_STEP_TOKENS = 2048
_CACHE_PROTOCOLS = ("streaming-decode", "prefix-continuation")
_NO_WINDOW = "vLLM takes the window from the model's configuration and has no other"


@dataclass(frozen=True)
class VllmLimits:
    """Limits of one engine, by vLLM's names.

    Parameters
    ----------
    max_model_len
        Tokens of a sequence at most.
    max_num_seqs
        Sequences at the same time.
    max_num_batched_tokens
        Tokens of a step at most.
    enable_prefix_caching
        Whether full blocks are found again.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = False

    @classmethod
    def of(cls, case: Case) -> VllmLimits:
        """Those of a plan, or a design point; else of one sequence that the speed pass and the longest window fit into."""
        workload, params, plan = case.workload, case.params, ServingPlan.of(case)
        if plan is not None:
            return cls(plan.max_model_len, plan.max_num_seqs, plan.step_tokens, plan.prefix_caching)
        if workload.get("protocol") == "serving":
            batch = int(params["batch"])
            return cls(
                max_model_len=int(params["context"]),
                max_num_seqs=batch,
                # every running sequence has a token in a step
                max_num_batched_tokens=max(int(params["prefill_chunk"]), batch),
                enable_prefix_caching=bool(workload["prefix_caching"]),
            )
        # one token more: what a request holds is read while it still runs
        spoken = int(workload.get("prompt_tokens", 1)) + int(workload.get("max_new_tokens", 1)) + 1
        longest = max(spoken, int(workload.get("max_length") or 0) + 1, _scored(workload))
        return cls(longest, 1, min(longest, _STEP_TOKENS))

    @classmethod
    def token_by_token(cls, tokens: int) -> VllmLimits:
        """Those of a sequence of ``tokens`` of which every step feeds one."""
        return cls(tokens, 1, 1)


def _scored(workload: Mapping[str, Any]) -> int:
    """Tokens that a cache protocol scores, with the prompt before them."""
    if workload.get("protocol") not in _CACHE_PROTOCOLS:
        return 0
    return int(workload.get("prompt_tokens", 0)) + int(workload.get("max_tokens", 0))


def point_reach(case: Case, block_tokens: int) -> Reach:
    """What of a design point reaches vLLM."""
    limits = VllmLimits.of(case)
    settings: dict[str, Any] = {
        "context": limits.max_model_len,
        "batch": limits.max_num_seqs,
        "step_tokens": limits.max_num_batched_tokens,
        "block_size": block_tokens,
    }
    asked = {"window": int(case.params["window"]) > 0, "sink": int(case.params["sink"]) > 0}
    return Reach(settings, {axis: _NO_WINDOW for axis, is_asked in asked.items() if is_asked})


def plan_blocks(plan: ServingPlan, *, block_tokens: int, block_bytes: int) -> int:
    """Blocks of a plan's pool that requests can own: whole ones of vLLM's, no more than the plan has.

    Raises
    ------
    CaseInvalid
        If the longest request does not fit into them.
    """
    if plan.pool_blocks is not None:
        option, blocks = f"--kv-pool-blocks={plan.pool_blocks}", plan.pool_blocks * BLOCK_TOKENS // block_tokens
    else:
        option, blocks = f"--kv-pool-bytes={plan.pool_bytes}", (plan.pool_bytes or 0) // block_bytes
    needed = -(-plan.max_model_len // block_tokens)
    if blocks < needed:
        raise CaseInvalid(
            f"{option}: {blocks} of vLLM's blocks of {block_tokens} tokens are fewer than the {needed} of one request of "
            f"{plan.max_model_len} tokens; give a larger pool, or a smaller --kv-vllm-block-size"
        )
    return blocks
