"""Quality of a cache: the two cache protocols, paired with the full cache, and the leak guard."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.engines.capabilities import GivesLogits, ScoresThroughCache, lacking
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.divergence import CACHE_DIVERGENCE, put_cache_divergence
from kvsuite.measure.pooled import POOLED, not_finite, put_perplexity
from kvsuite.meters.divergence import TokenDivergence, joined_divergence
from kvsuite.meters.quality import TokenScores, paired_ratio, perplexity
from kvsuite.meters.reference_rows import RowComparison

from .options import CompressionOptions

# a compressed cache that predicts clearly better than the full one saw the future (docs/protocols.md, the leak guard)
_LEAK_NATS, _LEAK_SIGMAS = 0.1, 4.0


def score_through_cache(run: CaseRun, session: Session) -> None:
    """Perplexity through the case's cache, beside the full cache's on the same tokens (docs/protocols.md)."""
    compares = run.options.of(CompressionOptions).divergence
    names = (*POOLED, "perplexity_full", "ppl_ratio", "ppl_ratio_se", *(CACHE_DIVERGENCE if compares else ()))
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
    scores, references, compared = [], [], []
    is_full = run.case.policy is None and format_of(run.case) is None
    for index, tokens in enumerate(texts.tokens):
        place = f"text {index + 1}/{len(texts.tokens)}"
        report = functools.partial(run.progress, f"scoring {place}")
        if compares and isinstance(session, GivesLogits):
            full_report = report if is_full else functools.partial(run.progress, f"full cache, {place}")
            rows = run.texts.reference_rows(session, tokens, protocol, prefix, full_report)
            assert rows.scores is not None
            if is_full:
                scores.append(rows.scores)
            else:
                arm = RowComparison(rows)
                scores.append(session.score_rows(tokens, protocol, prefix, arm.add, full=False, progress=report))
                compared.append(arm.found(scores[-1]))
        else:
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
    if compares:
        _divergence(run, session, compared, facts)
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
    if compared:
        run.found.sidecar["kld"] = [x for one in compared for x in one.kld]
        run.found.sidecar["same_top1"] = [x for one in compared for x in one.same_top1]
    leak = _LEAK_SIGMAS * (paired.difference_se or 0.0)
    if paired.mean_difference < -max(_LEAK_NATS, leak):
        raise CaseInvalid(
            f"leak guard: perplexity {pooled.value:.3f} is clearly below the full cache's {full.value:.3f} on the same "
            "tokens; the compressed cache saw tokens it should predict"
        )
    run.found.dataset_revision = texts.revision


def _divergence(run: CaseRun, session: Session, compared: Sequence[TokenDivergence], facts: Mapping[str, Any]) -> None:
    """Distance to the full cache in the model's dtype, row by row."""
    if not compared:
        reason = lacking(session, GivesLogits) or "this is the reference"
        for name in CACHE_DIVERGENCE:
            run.found.put(name, None, reason=reason)
        return
    joined = joined_divergence(compared)
    if broken := not_finite(joined.nll_reference, session.dtype_name, "losses of the full cache"):
        raise CaseInvalid(broken)
    put_cache_divergence(run.found, joined, reference="full cache in the model's dtype, served alike", **facts)


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
