"""What the worker answers, as times of requests, counts and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from kvsuite.engines.results import EngineView, MemoryPass, Served, ServeRequest
from kvsuite.meters.memory import Phase, Reading
from kvsuite.meters.timing import RequestTimes

_NO_ALLOCATIONS = "torch counts no allocations on a CPU"


def served_requests(answer: Mapping[str, Any], requests: Sequence[ServeRequest], *, timed: bool) -> Served:
    """Requests that were served at once.

    Parameters
    ----------
    answer
        Of the worker: ends of the steps in seconds after the requests came, and which step gave which tokens.
    requests
        What was asked.
    timed
        Whether times are wanted.
    """
    ends, found = answer["step_ends"], answer["requests"]
    times = [
        RequestTimes(
            len(request.prompt),
            len(request.prompt) - one["cached_tokens"],
            [(ends[step], count) for step, count in one["chunks"]],
        )
        for request, one in zip(requests, found, strict=True)
    ]
    counts = dict(answer["counts"])
    counts["logical_prompt_tokens"] = sum(len(one.prompt) for one in requests)
    counts["logical_output_tokens"] = sum(len(one["tokens"]) for one in found)
    view = EngineView(own_times(found), {}, {})
    return Served(times if timed else [], [one["tokens"] for one in found], counts, engine=view)


def own_times(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """vLLM's own times from its own stamps, means over the requests; what it does not tell of all of them is left out."""
    stamps = [one["own"] for one in found]
    if not all(stamps):
        return {}
    times = {"engine_ttft_s": fmean(one["first_token_s"] for one in stamps)}
    if all(len(one["tokens"]) > 1 for one in found):
        times["engine_tpot_s"] = fmean(
            (own["last_token_s"] - own["first_token_s"]) / (len(one["tokens"]) - 1)
            for own, one in zip(stamps, found, strict=True)
        )
    return times


def memory_pass(
    answer: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    token_bytes: int,
    layers: int,
    resident: Reading,
    driver: Reading,
) -> MemoryPass:
    """The instrumented pass.

    Parameters
    ----------
    answer
        Of the worker: tokens and blocks of each request at its first and its last token, and the allocators of all cards.
    facts
        What vLLM said when it had started.
    token_bytes
        Of a token's keys and values on all cards together.
    layers
        Of the model.
    resident, driver
        Meters of the host and of the device.
    """
    first, last, cards = answer["first"], answer["last"], facts["cards"]
    blocks = sum(one["blocks"] for one in last)
    pool = sum(card["pool_bytes"] for card in cards)
    reported = {
        "pool_bytes": pool,
        "pool_blocks": int(facts["num_blocks"]),
        "kv_blocks": blocks,
        "kv_block_bytes": blocks * int(facts["block_size"]) * token_bytes,
    }
    if "peak_bytes" in cards[0]:
        for index, (card, after) in enumerate(zip(cards, answer["decode"], strict=True)):
            reported[f"card{index}_weights_bytes"] = card["weights_bytes"]
            reported[f"card{index}_pool_bytes"] = card["pool_bytes"]
            reported[f"card{index}_peak_bytes"] = max(after["peak_bytes"], answer["prefill"][index]["peak_bytes"])
    if "captured_bytes" in facts:
        reported["captured_bytes"] = int(facts["captured_bytes"])
    return MemoryPass(
        prefill=_phase(answer["before"], answer["prefill"]),
        decode=_phase(answer["prefill"], answer["decode"]),
        resident=resident,
        driver=driver,
        kv_bytes_prefill=token_bytes * sum(one["tokens"] for one in first),
        kv_bytes_decode=token_bytes * sum(one["tokens"] for one in last),
        kv_bytes_allocated=pool,
        lengths_prefill=[max(one["tokens"] for one in first)] * layers,
        lengths_decode=[max(one["tokens"] for one in last)] * layers,
        reported=reported,
    )


def _phase(begin: Sequence[Mapping[str, int]], end: Sequence[Mapping[str, int]]) -> Phase:
    """Bytes of a phase, of all cards together."""
    return Phase(_sum(begin, "allocated_bytes"), _sum(end, "peak_bytes"), _sum(end, "reserved_bytes"))


def _sum(cards: Sequence[Mapping[str, int]], name: str) -> Reading:
    if not all(name in card for card in cards):
        return Reading(reason=_NO_ALLOCATIONS)
    return Reading(sum(card[name] for card in cards))
