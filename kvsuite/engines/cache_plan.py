"""How many tokens a policy will hold at every step, known before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.compression.base import Policy


@dataclass(frozen=True)
class CachePlan:
    """Stored tokens of one layer over a request.

    Parameters
    ----------
    capacity
        Most tokens held at once after the prefill forward, the one being attended to included.
    prefill
        Tokens held after the prompt.
    final
        Tokens held after the last step.
    """

    capacity: int
    prefill: int
    final: int


def plan(policy: Policy | None, prompt_tokens: int, steps: int) -> CachePlan:
    """Follow ``policy`` through a prompt of ``prompt_tokens`` and ``steps`` single-token steps.

    A prompt is compressed layer by layer while it is prefilled, so its full length never counts into ``capacity`` when the
    policy acts on it. ``None`` is the full cache.
    """
    if policy is None:
        total = prompt_tokens + steps
        return CachePlan(capacity=total, prefill=prompt_tokens, final=total)
    done = False

    def after(length: int, seen: int) -> int:
        nonlocal done
        if not policy.due(step=seen, done=done, prompt=seen == prompt_tokens):
            return length
        size = policy.size_after(length)
        done = done or size < length
        return size

    stored = prefill = after(prompt_tokens, prompt_tokens)
    capacity = stored
    for step in range(1, steps + 1):
        capacity = max(capacity, stored + 1)
        stored = after(stored + 1, prompt_tokens + step)
    return CachePlan(capacity=capacity, prefill=prefill, final=stored)
