"""One context asked by several requests in turn, with and without a prefix cache: answers, hits, times to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from kvsuite.case import Case
from kvsuite.engines.capabilities import ServesUnderLoad
from kvsuite.engines.engine import Session
from kvsuite.engines.questions import Asked, Question
from kvsuite.engines.results import RequestServed, Served, ServeRequest
from kvsuite.engines.serving_plan import SERVING_PARAM
from kvsuite.measure.case_run import CaseRun
from kvsuite.workloads.prompts import make_prompts

from .cases import REUSE
from .sampling import require_room, retrieval_samples
from .scores import Mean

# tokens of a question and an answer of random weights
_RANDOM = (16, 4)


def measure_reuse(case: Case, session: Session, run: CaseRun) -> None:
    """Serve the same requests twice, one after the other: without a prefix cache, then with one.

    Raises
    ------
    CaseInvalid
        If a prompt is longer than the model takes, or an answer cannot be scored.
    """
    assert isinstance(session, ServesUnderLoad)  # `RetrievalSuite.needs`
    is_dummy = bool(session.model["is_dummy"])
    if is_dummy:
        run.found.inert["task"] = "random weights: prompts are random tokens, and no answer is right"
        asked = _random(case, session, run)
    else:
        # each sample has one context that is asked at every depth
        asked = [sample.asked[0] for sample in retrieval_samples(case, session, run)]
    length = int(case.workload["prompt_tokens"])
    require_room(session, length, max(one.steps for one in asked))
    places = [(sample, turn) for sample, one in enumerate(asked) for turn in range(len(one.questions))]
    questions = [question for one in asked for question in one.questions]
    requests = [
        ServeRequest([*one.context, *question.tokens], len(question.answer), rows=1)
        for one in asked
        for question in one.questions
    ]
    run.phase("decode")
    session.prepare(_without_prefix_cache(case))
    run.progress("without a prefix cache", 0, 2)
    cold = session.serve_under_load(requests, concurrency=1)
    session.prepare(case)
    run.progress("with a prefix cache", 1, 2)
    warm = session.serve_under_load(requests, concurrency=1)
    rows = [
        _row(place, question, *outcomes)
        for place, question, *outcomes in zip(places, questions, _each(cold), _each(warm), strict=True)
    ]
    run.found.samples[REUSE] = rows
    _put(run, rows, reason="random weights" if is_dummy else "")
    differing = [index for index, row in enumerate(rows) if row["warm"] != row["cold"]]
    if differing:
        run.found.warnings.append(
            f"a warm prefix cache changed the output of {len(differing)} of {len(rows)} requests, the first of sample "
            f"{rows[differing[0]]['sample']}; samples.reuse has each"
        )


def _without_prefix_cache(case: Case) -> Case:
    plan = dict(case.params[SERVING_PARAM]) | {"prefix_caching": False}
    return replace(case, params=dict(case.params) | {SERVING_PARAM: plan})


def _random(case: Case, session: Session, run: CaseRun) -> list[Asked]:
    length, count = int(case.workload["prompt_tokens"]), int(case.workload["num_samples"])
    sizes: Any = {"vocab_size": session.vocab_size, "seed": run.common.seed, "token_pool": None}
    contexts = make_prompts(count=count, length=length, **sizes)
    asked, answered = _RANDOM
    turns = len(case.workload["depths"])
    behind = iter(make_prompts(count=count * turns, length=asked, **sizes))
    return [Asked(context, tuple(Question(next(behind), [0] * answered) for _ in range(turns))) for context in contexts]


def _each(served: Served) -> list[tuple[list[int], RequestServed]]:
    return list(zip(served.outputs, served.requests, strict=True))


def _row(
    place: tuple[int, int],
    question: Question,
    cold: tuple[list[int], RequestServed],
    warm: tuple[list[int], RequestServed],
) -> dict[str, Any]:
    """One request, in JSON types."""
    return {
        "sample": place[0],
        "turn": place[1],
        "right": list(question.answer),
        "cold": cold[0],
        "warm": warm[0],
        "prompt_tokens": warm[1].prompt_tokens,
        "hit_tokens": warm[1].cached_tokens,
        "ttft_cold_s": cold[1].token_s[0] - cold[1].arrival_s,
        "ttft_warm_s": warm[1].token_s[0] - warm[1].arrival_s,
        "stored_tokens": warm[1].stored_tokens,
    }


def _put(run: CaseRun, rows: Sequence[dict[str, Any]], *, reason: str) -> None:
    found = run.found
    groups: dict[int, list[float]] = {}
    for row in rows:
        groups.setdefault(row["sample"], []).append(float(row["warm"] == row["right"]))
    exact = Mean.of([fmean(group) for group in groups.values()])
    facts = {"contexts": len(groups), "questions": len(rows)}
    found.put("retrieval_exact", None if reason else exact.value, **({"reason": reason} if reason else facts))
    found.put("retrieval_exact_se", None if reason else exact.error, reason=reason or "one sample only")
    found.put("reuse_differing", sum(row["warm"] != row["cold"] for row in rows), requests=len(rows))
    again = [row for row in rows if row["turn"]]
    alone = "one question a context: nothing is asked again"
    found.put("reuse_hit_tokens", fmean(row["hit_tokens"] for row in again) if again else None, reason=alone)
    # what is made once, at the first requests, is no part of a time
    timed = [row for row in again if row["sample"]]
    for name, column in (("ttft_s", "ttft_cold_s"), ("ttft_cached_s", "ttft_warm_s")):
        found.put(name, [row[column] for row in timed] or None, clock="delivery", reason=alone)
