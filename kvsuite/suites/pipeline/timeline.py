"""What a record keeps of the course of a run under load: who waited, ran and was served when, and what the lanes did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsuite.engines.results import RequestServed, Served, StepServed

#: where it stands in a record's samples
TIMELINE = "timeline"
#: spans of steps and requests that a record keeps; what comes later is left out, and ``until_s`` says from when
MOST_SPANS, MOST_REQUESTS = 1500, 512
#: a pause of a lane that is shorter than this, in seconds or in lengths of the step before it, does not end a span
_PAUSE_S, _PAUSE_STEPS = 1e-3, 0.25
_DECIMALS = 5


def timeline_of(served: Served) -> dict[str, Any]:
    """The course of a run, in JSON types, small enough for a record.

    Steps of a lane that follow each other and are of one kind are one span: ``prompt`` fed prompts alone, ``decode`` decoding
    requests alone, ``both`` the two together.

    Returns
    -------
    dict[str, Any]
        ``spans`` (lists by column: lane, kind, start_s, end_s, steps, prompt_tokens, decode_tokens), ``state`` (t_s, running,
        waiting, used_blocks, wherever one of the three changes), ``requests`` (arrival_s, admitted_s, first_token_s,
        last_token_s, prompt_tokens, cached_tokens, preemptions), ``decisions`` of a controller, ``end_s``, ``until_s`` (the
        time from which on spans are left out, ``None`` if none are) and ``requests_left_out``.
    """
    spans, until_s = _spans(served.steps)
    kept = served.requests[:MOST_REQUESTS]
    return {
        "spans": spans,
        "state": _state(served.steps, until_s),
        "requests": _requests(kept),
        "decisions": list(served.decisions),
        "end_s": round(max((time for one in served.requests for time in one.token_s[-1:]), default=0.0), _DECIMALS),
        "until_s": until_s,
        "requests_left_out": len(served.requests) - len(kept),
    }


def _kind(step: StepServed) -> str:
    if step.prompt_tokens and step.decode_tokens:
        return "both"
    return "prompt" if step.prompt_tokens else "decode"


def _spans(steps: Sequence[StepServed]) -> tuple[dict[str, list[Any]], float | None]:
    found: list[dict[str, Any]] = []
    open_spans: dict[str, dict[str, Any]] = {}
    until_s = None
    for step in sorted(steps, key=lambda step: step.start_s):
        if not step.prompt_tokens and not step.decode_tokens:
            continue
        kind, span = _kind(step), open_spans.get(step.lane)
        pause = max(_PAUSE_S, _PAUSE_STEPS * (step.end_s - step.start_s))
        if span is None or span["kind"] != kind or step.start_s - span["end_s"] > pause:
            if len(found) == MOST_SPANS:
                until_s = round(step.start_s, _DECIMALS)
                break
            span = {
                "lane": step.lane, "kind": kind, "start_s": round(step.start_s, _DECIMALS), "end_s": step.end_s,
                "steps": 0, "prompt_tokens": 0, "decode_tokens": 0,
            }  # fmt: skip
            found.append(span)
            open_spans[step.lane] = span
        span["end_s"] = round(max(span["end_s"], step.end_s), _DECIMALS)
        span["steps"] += 1
        span["prompt_tokens"] += step.prompt_tokens
        span["decode_tokens"] += step.decode_tokens
    names = ("lane", "kind", "start_s", "end_s", "steps", "prompt_tokens", "decode_tokens")
    return {name: [span[name] for span in found] for name in names}, until_s


def _state(steps: Sequence[StepServed], until_s: float | None) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"t_s": [], "running": [], "waiting": [], "used_blocks": []}
    before = None
    for step in sorted(steps, key=lambda step: step.end_s):
        if until_s is not None and step.end_s > until_s:
            break
        now = (step.running, step.waiting, step.used_blocks)
        if now != before:
            for name, value in zip(found, (round(step.end_s, _DECIMALS), *now), strict=True):
                found[name].append(value)
            before = now
    return found


def _requests(requests: Sequence[RequestServed]) -> dict[str, list[Any]]:
    return {
        "arrival_s": [round(one.arrival_s, _DECIMALS) for one in requests],
        "admitted_s": [round(one.admitted_s, _DECIMALS) for one in requests],
        "first_token_s": [round(one.token_s[0], _DECIMALS) if one.token_s else None for one in requests],
        "last_token_s": [round(one.token_s[-1], _DECIMALS) if one.token_s else None for one in requests],
        "prompt_tokens": [one.prompt_tokens for one in requests],
        "cached_tokens": [one.cached_tokens for one in requests],
        "preemptions": [one.preemptions for one in requests],
    }
