"""What replies say: times and tokens of requests, by the client's clock and the server's own account."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from kvsuite.engines.results import RequestServed, ServeRequest
from kvsuite.engines.streamed_tokens import spread_tokens
from kvsuite.errors import CaseInvalid
from kvsuite.meters.timing import RequestTimes

from .dialect import TOKEN_IDS, Dialect
from .streams import ServerReply


def request_times(
    reply: ServerReply, request: ServeRequest, seconds: Sequence[float], dialect: Dialect
) -> RequestTimes:
    """Times of a reply that was asked for at once.

    Raises
    ------
    CaseInvalid
        If the server counts other tokens than were sent or came.
    """
    prompt = _prompt_tokens(reply, request, dialect)
    return RequestTimes(prompt, prompt - (cached_tokens(reply) or 0), _chunks(reply, seconds))


def request_served(
    reply: ServerReply, request: ServeRequest, seconds: Sequence[float], dialect: Dialect
) -> RequestServed:
    """Times of a reply under load: a client knows when it was due and when its tokens came.

    Raises
    ------
    CaseInvalid
        As `request_times`.
    """
    prompt, cached = _prompt_tokens(reply, request, dialect), cached_tokens(reply)
    return RequestServed(
        arrival_s=request.arrival_s if reply.sent is None else seconds[reply.sent],
        admitted_s=None,
        token_s=[at for at, tokens in _chunks(reply, seconds) for _ in range(tokens)],
        prompt_tokens=prompt,
        cached_tokens=cached,
        computed_prompt_tokens=None if cached is None else prompt - cached,
        preemptions=None,
        stored_tokens=None,
        evicted_tokens=None,
    )


def counts_of(replies: Sequence[ServerReply], prompt_tokens: int) -> dict[str, int]:
    """What the server counted of requests together; what it does not tell is not there."""
    found = {"logical_prompt_tokens": prompt_tokens, "chunks": sum(len(reply.events) for reply in replies)}
    cached = [cached_tokens(reply) for reply in replies]
    known = [count for count in cached if count is not None]
    if len(known) == len(cached):
        found |= {"prefix_hit_tokens": sum(known), "computed_prefill_tokens": prompt_tokens - sum(known)}
    return found


def output_ids(replies: Sequence[ServerReply]) -> list[list[int]]:
    """Token ids of every reply, nothing at all where one does not tell them."""
    found = [[ids for _, ids in reply.events] for reply in replies]
    if any(ids is None for each in found for ids in each):
        return []
    return [[token for ids in each for token in ids or ()] for each in found]


def own_times(replies: Sequence[ServerReply]) -> dict[str, float]:
    """Means of the times that a server sends with its answers (llama.cpp's ``timings``), by its own names."""
    names = [name for name, value in replies[0].timings.items() if isinstance(value, int | float)]
    return {
        f"timings.{name}": fmean(float(reply.timings[name]) for reply in replies)
        for name in names
        if all(isinstance(reply.timings.get(name), int | float) for reply in replies)
    }


def cached_tokens(reply: ServerReply) -> int | None:
    """Tokens of the prompt that the server found in its cache, ``None`` where it does not tell."""
    details = reply.usage.get("prompt_tokens_details") or {}
    found = details.get("cached_tokens")
    return None if found is None else int(found)


def _prompt_tokens(reply: ServerReply, request: ServeRequest, dialect: Dialect) -> int:
    told = reply.usage.get("prompt_tokens")
    if told is None:
        return len(request.prompt)
    if dialect.prompt == TOKEN_IDS and told != len(request.prompt):
        raise CaseInvalid(f"the server took a prompt of {len(request.prompt)} tokens for {told}")
    return int(told)


def _chunks(reply: ServerReply, seconds: Sequence[float]) -> list[tuple[float, int]]:
    told: Any = reply.usage.get("completion_tokens")
    marks = [mark for mark, _ in reply.events]
    if marks and all(ids is not None for _, ids in reply.events):
        sizes = [len(ids or ()) for _, ids in reply.events]
        if told is not None and told != sum(sizes):
            raise CaseInvalid(f"the server sent {sum(sizes)} tokens and counts {told}")
    else:
        if reply.last is not None and told is not None and len(marks) < told:
            # the last event has no text of its own where the last token ends none
            marks.append(reply.last)
        if not marks or (told is not None and len(marks) > told):
            raise CaseInvalid(f"the server sent {told or 0} tokens in {len(marks)} pieces; no time of a token is known")
        sizes = [1] * len(marks) if told is None else spread_tokens(int(told), len(marks))
    return [(seconds[mark], size) for mark, size in zip(marks, sizes, strict=True)]
