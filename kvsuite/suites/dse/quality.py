"""Perplexity of long streams through the limits of a design point: what its context, window and sinks cost."""

from __future__ import annotations

import functools
from typing import Any

from kvsuite.engines.capabilities import ScoresWindows, lacking
from kvsuite.engines.engine import Session
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.pooled import POOLED, put_perplexity
from kvsuite.workloads.windows import plan_windows

PROTOCOL = "stream"


def score_streams(run: CaseRun, session: Session) -> None:
    """Score the case's texts in streams as long as its context.

    A text is cut into streams that share nothing, so all points of a run score the same text; of a stream of `context` tokens
    all but the first are scored.

    Raises
    ------
    CaseInvalid
        If a loss is not finite.
    """
    reason = "random weights" if session.model.get("is_dummy") else lacking(session, ScoresWindows)
    if reason or not isinstance(session, ScoresWindows):
        for name in POOLED:
            run.found.put(name, None, reason=reason)
        return
    case = run.case
    texts = run.texts.streams(session, case.workload)
    run.found.dataset = texts.facts
    context = int(case.params["context"])
    table: dict[str, list[Any]] = {name: [] for name in ("text", "position", "token", "nll", "correct")}
    samples = []
    for index, tokens in enumerate(texts.tokens):
        windows = plan_windows("disjoint", len(tokens), context, context)
        report = functools.partial(_report, run, f"scoring text {index + 1}/{len(texts.tokens)}")
        scores = session.score_windows(tokens, windows, prefix="none", prefix_token=None, progress=report).tokens
        table["text"] += [index] * len(scores.nll)
        table["position"] += scores.positions
        table["token"] += scores.targets
        table["nll"] += scores.nll
        table["correct"] += scores.correct
        samples.append(
            {
                "index": index,
                "nll_sum": sum(scores.nll),
                "tokens": len(scores.nll),
                "correct": sum(scores.correct),
                "sha256": texts.hashes[index],
            }
        )
    nll = table["nll"]
    facts = {"protocol": PROTOCOL, "context": context, "window": case.params["window"], "sink": case.params["sink"]}
    accuracy = sum(table["correct"]) / len(nll)
    pooled = put_perplexity(run.found, nll, accuracy, dtype=session.dtype_name, **facts)
    run.found.samples["texts"] = samples
    run.found.tokens["scored"] = pooled.n
    run.found.sidecar = table
    run.found.dataset_revision = texts.revision


def _report(run: CaseRun, phase: str, done: int, of: int, mean: float) -> None:
    run.progress(phase, done, of)
