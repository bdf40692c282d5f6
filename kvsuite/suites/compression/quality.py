"""Quality of a cache: the two cache protocols, paired with the full cache, and the leak guard."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from kvsuite.engines.capabilities import ScoresThroughCache, lacking
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.pooled import POOLED, not_finite, put_perplexity
from kvsuite.meters.quality import TokenScores, paired_ratio, perplexity

# a compressed cache that predicts clearly better than the full one saw the future (docs/protocols.md, the leak guard)
_LEAK_NATS, _LEAK_SIGMAS = 0.1, 4.0


def score_through_cache(run: CaseRun, session: Session) -> None:
    """Perplexity through the case's cache, beside the full cache's on the same tokens (docs/protocols.md)."""
    names = (*POOLED, "perplexity_full", "ppl_ratio", "ppl_ratio_se")
    if session.model.get("is_dummy"):
        run.found.inert["corpus"] = "random weights: nothing is scored, and prompts are random tokens"
        for name in names:
            run.found.put(name, None, reason="random weights")
        return
    if not isinstance(session, ScoresThroughCache):
        for name in names:
            run.found.put(name, None, reason=lacking(session, ScoresThroughCache))
        return
    workload = run.case.workload
    protocol, max_tokens = str(workload["protocol"]), int(workload["max_tokens"])
    prefix = int(workload["prompt_tokens"]) if protocol == "prefix-continuation" else 0
    texts = run.texts.scored(session, workload, tokens=prefix + max_tokens)
    run.found.dataset = texts.facts
    scores, references = [], []
    for index, tokens in enumerate(texts.tokens):
        report = functools.partial(run.progress, f"scoring text {index + 1}/{len(texts.tokens)}")
        scores.append(session.score(tokens, protocol, prefix, report))
        references.append(run.texts.reference(session, tokens, scores[-1].positions[0]))
    nll = [x for score in scores for x in score.nll]
    reference = [x for score in references for x in score.nll]
    facts: dict[str, Any] = {"protocol": protocol, "prefix": prefix}
    hits = [hit for score in scores for hit in score.correct]
    pooled = put_perplexity(run.found, nll, sum(hits) / len(hits), dtype=session.dtype_name, **facts)
    if reason := not_finite(reference, session.dtype_name, "losses of the full cache"):
        raise CaseInvalid(reason)
    full, paired = perplexity(reference), paired_ratio(nll, reference)
    run.found.put("perplexity_full", full.value, protocol="one teacher-forced forward over the same text")
    run.found.put("ppl_ratio", paired.ratio, **facts)
    run.found.put("ppl_ratio_se", paired.standard_error, reason="one token only")
    run.found.samples["texts"] = [
        {
            "index": i,
            "nll_sum": sum(s.nll),
            "tokens": len(s.nll),
            "correct": sum(s.correct),
            "sha256": texts.hashes[i],
        }
        for i, s in enumerate(scores)
    ]
    run.found.sidecar = _token_table(scores, references)
    leak = _LEAK_SIGMAS * (paired.difference_se or 0.0)
    if paired.mean_difference < -max(_LEAK_NATS, leak):
        raise CaseInvalid(
            f"leak guard: perplexity {pooled.value:.3f} is clearly below the full cache's {full.value:.3f} on the same "
            "tokens; the compressed cache saw tokens it should predict"
        )
    run.found.dataset_revision = texts.revision


def _token_table(scores: Sequence[TokenScores], references: Sequence[TokenScores]) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = {"text": [], "position": [], "token": [], "nll": [], "correct": [], "nll_full": []}
    for index, (score, reference) in enumerate(zip(scores, references, strict=True)):
        table["text"] += [index] * len(score.nll)
        table["position"] += score.positions
        table["token"] += score.targets
        table["nll"] += score.nll
        table["correct"] += score.correct
        table["nll_full"] += reference.nll
    return table
