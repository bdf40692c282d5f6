"""Perplexity of long streams through the limits of a design point: what its context, window and sinks cost."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

from kvsuite.engines.capabilities import ScoresWindows, lacking
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid
from kvsuite.meters.quality import perplexity
from kvsuite.workloads.windows import plan_windows

if TYPE_CHECKING:
    from kvsuite.measure.case_passes import CasePasses

PROTOCOL = "stream"
_METRICS = ("perplexity", "perplexity_se", "nll_sum", "nll_tokens", "next_token_acc")


def score_streams(work: CasePasses, session: Session) -> None:
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
        for name in _METRICS:
            work.put(name, None, reason=reason)
        return
    case = work.case
    texts = work.runner.texts.streams(session, case.workload)
    work.record.dataset = texts.facts
    work.dataset_revision = texts.revision
    context = int(case.params["context"])
    table: dict[str, list[Any]] = {name: [] for name in ("text", "position", "token", "nll", "correct")}
    samples = []
    for index, tokens in enumerate(texts.tokens):
        windows = plan_windows("disjoint", len(tokens), context, context)
        report = functools.partial(_report, work, f"scoring text {index + 1}/{len(texts.tokens)}")
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
    broken = sum(not math.isfinite(x) for x in nll)
    if broken:
        raise CaseInvalid(
            f"{broken} of {len(nll)} losses are not finite: the model overflows in {session.dtype_name}; give another "
            "--kv-dtype or --kv-quantization"
        )
    pooled = perplexity(nll)
    facts = {"protocol": PROTOCOL, "context": context, "window": case.params["window"], "sink": case.params["sink"]}
    work.put("perplexity", pooled.value, **facts)
    work.put("perplexity_se", pooled.standard_error, reason="one token only")
    work.put("nll_sum", pooled.nll_sum, **facts)
    work.put("nll_tokens", pooled.n)
    work.put("next_token_acc", sum(table["correct"]) / pooled.n, **facts)
    work.record.samples["texts"] = samples
    work.record.tokens["scored"] = pooled.n
    work.measured.tokens = table


def _report(work: CasePasses, phase: str, done: int, of: int, mean: float) -> None:
    work.progress(phase, done, of)
