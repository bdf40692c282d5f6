"""What MLC-LLM's answers say: times of requests, its own times, its counters; and how many tokens its pages must take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.streamed_tokens import spread_tokens
from kvsuite.errors import CaseInvalid
from kvsuite.meters.timing import RequestTimes

from .client import Reply
from .metrics import decode_steps

# of docs/mlc.md: NaN logits there, after which no request is ever answered
_ON_CPU = "MLC-LLM's CPU code gives NaN for {what}, and then hangs; use {mend} or a GPU (docs/mlc.md)"


def refuse_what_hangs(case: Case) -> None:
    """Refuse what MLC-LLM never answers on a CPU.

    Raises
    ------
    CaseInvalid
        With what would be answered.
    """
    if case.device_kind != "cpu":
        return
    batch, chunk = int(case.params["batch"]), int(case.params["prefill_chunk"])
    prompt = int(case.workload["prompt_tokens"])
    if batch > 1:
        raise CaseInvalid(_ON_CPU.format(what="requests that run together", mend="batch=1"))
    if prompt > chunk:
        mend = f"a --kv-prompt-share of at most {chunk / int(case.params['context']):.3g}"
        raise CaseInvalid(
            _ON_CPU.format(what=f"a prompt ({prompt} tokens) longer than prefill_chunk_size={chunk}", mend=mend)
        )


def counts_between(
    before: Mapping[str, Any], after: Mapping[str, Any], times: Sequence[RequestTimes]
) -> dict[str, int]:
    """What the server counted of requests between two readings of its counters.

    Raises
    ------
    CaseInvalid
        If it computed more than their prompts.
    """
    computed = int(after["prefill_tokens_sum"] - before["prefill_tokens_sum"])
    prompts = sum(one.prompt_tokens for one in times)
    if computed > prompts:
        raise CaseInvalid(
            f"mlc_llm computed {computed} prompt tokens for prompts of {prompts}: it took requests back and began again, "
            "which it does where pages are short; lower --kv-prompt-share or the batch"
        )
    steps = decode_steps(before, after)
    return {
        "computed_prefill_tokens": computed,
        "logical_prompt_tokens": prompts,
        "prefix_hit_tokens": prompts - computed,
        "preemptions": 0,
        "decode_steps": sum(steps.values()),
        "largest_batch": max(steps, default=0),
        "chunks": sum(len(one.chunks) for one in times),
    }


def request_times(reply: Reply, prompt: Sequence[int], seconds: Sequence[float]) -> RequestTimes:
    """Times of a reply, its tokens counted by the server's usage alone.

    A chunk has one token, or several where the text of one was no whole UTF-8: which ones is not told, so what is missing is
    spread over the chunks behind the first.
    """
    usage = reply.usage
    if int(usage["prompt_tokens"]) != len(prompt):
        raise CaseInvalid(f"mlc_llm took a prompt of {len(prompt)} tokens for {usage['prompt_tokens']}")
    generated, chunks = int(usage["completion_tokens"]), len(reply.stamps)
    if not 0 < chunks <= generated:
        raise CaseInvalid(f"mlc_llm sent {generated} tokens in {chunks} chunks; no time of a token is known")
    sizes = spread_tokens(generated, chunks)
    computed = int(usage.get("extra", {}).get("prefill_tokens", len(prompt)))
    return RequestTimes(
        len(prompt), computed, [(seconds[mark], size) for mark, size in zip(reply.stamps, sizes, strict=True)]
    )


def engine_times(replies: Sequence[Reply]) -> dict[str, float]:
    """The server's own times, means over the requests; of a request that it tells nothing of there is none."""
    extras = [reply.usage.get("extra") or {} for reply in replies]
    firsts = [float(extra["ttft_s"]) for extra in extras if "ttft_s" in extra]
    rates = [float(extra["decode_tokens_per_s"]) for extra in extras if extra.get("decode_tokens_per_s")]
    found = {}
    if len(firsts) == len(replies):
        found["engine_ttft_s"] = fmean(firsts)
    if len(rates) == len(replies):
        found["engine_tpot_s"] = fmean(1 / rate for rate in rates)
    return found
