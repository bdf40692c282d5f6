"""The course of a run as a record's samples have it: who waited, ran and was served when, and what the lanes did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: a pause of a lane that is shorter than this, in seconds or in lengths of the step after it, does not end a span
_PAUSE_S, _PAUSE_STEPS = 1e-3, 0.25
#: fields of a decision that change nothing by themselves
_BEHIND_IT = ("sm_ratio", "speedup", "reasons")


@dataclass
class Span:
    """Steps of one lane that follow each other and fed the same kind of tokens.

    Parameters
    ----------
    lane
        ``decode``, ``prompt``, or ``both`` where one stream does everything.
    kind
        ``prompt``: prompts alone; ``decode``: decoding requests alone; ``both`` together.
    start_s, end_s
        Seconds from the start of the run.
    steps, prompt_tokens, decode_tokens
        How many steps, and what they fed.
    """

    lane: str
    kind: str
    start_s: float
    end_s: float
    steps: int = 0
    prompt_tokens: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True)
class Course:
    """One timed round.

    Parameters
    ----------
    requests
        Rows with ``arrival_s``, ``admitted_s``, ``ttft_s``, ``end_s``, ``preemptions``.
    spans
        By start.
    state
        Time in seconds, running, waiting, blocks in use, by time, wherever one of the three changes: each step's from its
        start to its end, and nothing where no lane had anything to do.
    decisions
        Of a controller, by time, those that changed something.
    """

    requests: Sequence[Mapping[str, Any]]
    spans: Sequence[Span]
    state: Sequence[tuple[float, int, int, int]]
    decisions: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, samples: Mapping[str, Any]) -> Course | None:
        """From a record's samples; ``None`` where they do not tell."""
        requests, columns = samples.get("requests") or [], samples.get("steps") or {}
        if not requests or not columns.get("start_s"):
            return None
        steps = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        decisions: list[Mapping[str, Any]] = []
        for decision in samples.get("decisions") or []:
            # who is served next is chosen at every step; that is what the lanes show
            if "decision" in decision and (not decisions or decided(decision) != decided(decisions[-1])):
                decisions.append(decision)
        return cls(requests, spans_of(steps), state_of(steps), decisions)

    @property
    def end_s(self) -> float:
        """When the last request had its last token."""
        return max(float(one["end_s"]) for one in self.requests)

    @property
    def lanes(self) -> set[str]:
        """Lanes that did something."""
        return {span.lane for span in self.spans}


def decided(decision: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a controller decided, without the estimates and reasons behind it."""
    return {name: value for name, value in decision["decision"].items() if name not in _BEHIND_IT}


def spans_of(steps: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Join the steps of a lane that follow each other without a pause and are of one kind."""
    found: list[Span] = []
    last: dict[str, Span] = {}
    for step in sorted(steps, key=lambda step: float(step["start_s"])):
        prompts, decodes, lane = int(step["prompt_tokens"]), int(step["decode_tokens"]), str(step["lane"])
        if not prompts and not decodes:
            continue
        kind = "both" if prompts and decodes else "prompt" if prompts else "decode"
        span = last.get(lane)
        if span is None or span.kind != kind or step["start_s"] - span.end_s > _pause(step):
            span = last[lane] = Span(lane, kind, step["start_s"], step["end_s"])
            found.append(span)
        span.end_s = max(span.end_s, step["end_s"])
        span.steps += 1
        span.prompt_tokens += prompts
        span.decode_tokens += decodes
    return found


def state_of(steps: Sequence[Mapping[str, Any]]) -> list[tuple[float, int, int, int]]:
    """What ran, waited and was in use during the steps, wherever it changed.

    What a step found counts for all of it; where steps of two lanes overlap, that of the one that ends first until its end.
    """
    found: list[tuple[float, int, int, int]] = []
    until = 0.0
    for step in sorted(steps, key=lambda step: float(step["end_s"])):
        now = (int(step["running"]), int(step["waiting"]), int(step["used_blocks"]))
        start = max(float(step["start_s"]), until)
        if found and start - until > _pause(step):
            found.append((until, 0, 0, 0))
        if not found or found[-1][1:] != now:
            found.append((start, *now))
        until = float(step["end_s"])
    return found


def _pause(step: Mapping[str, Any]) -> float:
    """Seconds before a step for which there was nothing to do, if it is longer than this."""
    return max(_PAUSE_S, _PAUSE_STEPS * (float(step["end_s"]) - float(step["start_s"])))
