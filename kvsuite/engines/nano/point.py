"""Design points on the `nano` engine: the runtime limits of a point, what of it reaches them, and what its requests hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.nano.memory_model import pool_blocks
from kvsuite.engines.results import Reach
from kvsuite.nanovllm.limits import Limits

from .runtime import BLOCK_SIZE

_NEVER_SLIDES = "the window never slides: it is no shorter than the context"


def point_limits(params: Mapping[str, Any], *, prefix_caching: bool) -> Limits:
    """Limits of a design point: the pool holds ``batch`` sequences of the context, or of what a sliding window leaves.

    Prompts are fed before anything decodes, so that all sequences decode at the same time.

    Parameters
    ----------
    params
        ``context``, ``prefill_chunk``, ``batch``, ``window`` (-1: none) and ``sink``.
    prefix_caching
        Whether blocks are found again by their tokens.
    """
    context, batch, window = (int(params[name]) for name in ("context", "batch", "window"))
    # every running sequence has a token in a step
    step = max(int(params["prefill_chunk"]), batch)
    slides = 0 < window < context
    sinks = int(params["sink"]) if slides else 0
    blocks = pool_blocks(
        context=context, sequences=batch, chunk=step, window=window if slides else None, sinks=sinks,
        block_tokens=BLOCK_SIZE,
    )  # fmt: skip
    return Limits(
        max_model_len=context,
        max_num_seqs=batch,
        max_num_batched_tokens=step,
        block_size=BLOCK_SIZE,
        num_blocks=blocks,
        prefix_caching=prefix_caching,
        sliding_window=window if slides else None,
        attention_sinks=sinks,
        prefill_first=True,
    )


def point_reach(case: Case) -> Reach:
    """What of a design point reaches the runtime."""
    params, workload = case.params, case.workload
    limits = point_limits(params, prefix_caching=bool(workload["prefix_caching"]))
    inert = {}
    prompts = int(params["batch"]) * int(workload["prompt_tokens"])
    if int(params["prefill_chunk"]) >= prompts:
        # the pool of a window has room for a chunk; elsewhere nothing else looks at the limit
        whole = point_limits({**params, "prefill_chunk": prompts}, prefix_caching=limits.prefix_caching)
        if whole.num_blocks == limits.num_blocks:
            limits = whole
            inert["prefill_chunk"] = f"it never splits a step: all prompts together have {prompts} tokens"
    if int(params["window"]) > 0 and limits.sliding_window is None:
        inert["window"] = _NEVER_SLIDES
        if int(params["sink"]):
            inert["sink"] = _NEVER_SLIDES
    settings = {
        "context": limits.max_model_len,
        "step_tokens": limits.max_num_batched_tokens,
        "batch": limits.max_num_seqs,
        "window": limits.sliding_window,
        "sink": limits.attention_sinks,
        "num_blocks": limits.num_blocks,
    }
    return Reach(settings, inert)


def visible_tokens(window: int | None, sinks: int, position: int) -> int:
    """Tokens that the query at a position sees, its own among them."""
    return position + 1 if window is None else min(position + 1, window + sinks)
