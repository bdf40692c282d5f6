"""What the worker answers of requests that came at their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.engines.results import RequestServed, Served, ServeRequest, StepServed


def served_under_load(answer: Mapping[str, Any], requests: Sequence[ServeRequest]) -> Served:
    """Requests and steps of an answer, in its own seconds after the start.

    Parameters
    ----------
    answer
        Of the worker.
    requests
        What was asked.
    """
    found = answer["requests"]
    return Served(
        [],
        [one["tokens"] for one in found],
        dict(answer["counts"]),
        requests=[
            RequestServed(
                arrival_s=one["arrival_s"],
                admitted_s=one["admitted_s"],
                token_s=one["token_s"],
                prompt_tokens=len(request.prompt),
                cached_tokens=one["cached_tokens"],
                computed_prompt_tokens=one["computed_prompt_tokens"],
                preemptions=one["preemptions"],
                # the last token is chosen and never fed
                stored_tokens=float(len(request.prompt) + len(one["tokens"]) - 1),
                evicted_tokens=0.0,
            )
            for one, request in zip(found, requests, strict=True)
        ],
        steps=[StepServed("both", *step) for step in answer["steps"]],
    )
