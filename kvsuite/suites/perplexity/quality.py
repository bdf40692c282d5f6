"""Perplexity over token windows, and the distance to a reference weight format of the same model."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.case import Case
from kvsuite.engines.capabilities import ComparesWindows, ScoresWindows, lacking
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid, CaseSkipped
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.divergence import DIVERGENCE, put_divergence
from kvsuite.measure.pooled import not_finite, put_perplexity
from kvsuite.meters.divergence import TokenDivergence, joined_divergence
from kvsuite.meters.quality import NoExponential, paired_ratio, perplexity
from kvsuite.workloads.windowed import WindowedTexts, WindowRule
from kvsuite.workloads.windows import original_perplexity, target_weights

_DIVERGENCE = (
    *DIVERGENCE, "perplexity_reference", "delta_perplexity", "ppl_ratio_reference", "ppl_ratio_reference_se",
)  # fmt: skip
# protocols whose windows the original program's formula knows
_ORIGINAL = ("hf-strided", "disjoint")


class WindowQuality:
    """Scores the windows of one case.

    Parameters
    ----------
    run
        The case's.
    session
        The loaded engine.

    Raises
    ------
    UserError
        If the text cannot be read or is too short.
    CaseInvalid
        If the windows are longer than the model was trained for; `score`: if a loss is not finite.
    CaseSkipped
        If another data set of this run has the same text: it is one result.
    """

    def __init__(self, run: CaseRun, session: Session) -> None:
        self.run, self.session, self.case = run, session, run.case
        if not isinstance(session, ScoresWindows):
            raise CaseInvalid(f"no perplexity: {lacking(session, ScoresWindows)}")
        self._scorer: ScoresWindows = session
        workload = self.case.workload
        rule = WindowRule(
            protocol=str(workload["protocol"]),
            max_length=int(workload["max_length"]),
            stride=int(workload["stride"]),
            rule=None if workload["bos"] == "auto" else str(workload["bos"]),
            eval_tokens=workload["eval_tokens"],
        )
        trained = session.model.get("trained_length")
        if trained is not None and rule.max_length > trained:
            raise CaseInvalid(
                f"--kv-max-length={rule.max_length}: longer than the {trained} tokens that the model was trained for"
            )
        self.texts: WindowedTexts = run.texts.windowed(session, workload, rule)
        run.found.dataset = self.texts.facts
        self._weights = [target_weights(rule.protocol, text.windows) for text in self.texts.texts]
        self._refuse_a_second_result(rule)

    def score(self, *, timed: bool) -> None:
        """Keep perplexity, its error and what goes with it."""
        run, texts, workload = self.run, self.texts, self.case.workload
        if timed and self.case.device_kind == "cuda":
            # kernels are compiled and chosen in the first forward; a first window of one token has none
            first = next(window for window in texts.texts[0].windows if window.targets)
            self._scorer.score_windows(texts.texts[0].tokens, [first], **self._prefix)
        begin = time.perf_counter()
        scores = []
        for index, text in enumerate(texts.texts):
            report = functools.partial(self._report, f"scoring text {index + 1}/{len(texts.texts)}")
            scores.append(self._scorer.score_windows(text.tokens, text.windows, **self._prefix, progress=report))
        score_s = time.perf_counter() - begin
        nll = [x for score in scores for x in score.tokens.nll]
        hits = [hit for score in scores for hit in score.tokens.correct]
        facts = {
            "protocol": workload["protocol"],
            "max_length": workload["max_length"],
            "stride": workload["stride"],
            "bos": texts.rule,
        }
        pooled = put_perplexity(
            run.found, nll, sum(hits) / len(hits), dtype=self.session.dtype_name, weights=self._all_weights, **facts
        )
        if workload["protocol"] in _ORIGINAL and texts.rule == "none":
            found = original_perplexity(nll, texts.texts[0].windows) if len(texts.texts) == 1 else None
            run.found.put("ppl_original_formula", found, reason="several texts, or a window of one token")
        if workload["protocol"] == "lm-eval-rolling":
            self._per_word(pooled.nll_sum)
        if timed:
            clock = {"clock": "perf_counter, until the losses are on the host"}
            run.found.put("score_s", score_s, **clock)
            run.found.put("score_tok_s", len(nll) / score_s, **clock)
        run.found.tokens |= {
            "text": sum(len(text.tokens) for text in texts.texts),
            "scored": len(nll),
            "scored_forward": sum(score.forward_tokens for score in scores),
        }
        self.session.effective["scoring"] = scores[0].effective
        run.found.samples["texts"] = [
            {
                "index": i,
                "nll_sum": one.nll_sum,
                "tokens": one.n,
                "correct": sum(s.tokens.correct),
            }
            for i, (s, weights) in enumerate(zip(scores, self._weights, strict=True))
            for one in [perplexity(s.tokens.nll, weights)]
        ]
        run.found.sidecar = {
            "text": [index for index, score in enumerate(scores) for _ in score.tokens.nll],
            "position": [at for score in scores for at in score.tokens.positions],
            "token": [token for score in scores for token in score.tokens.targets],
            "nll": nll,
            "correct": hits,
        }
        run.found.dataset_revision = texts.revision

    def compare(self) -> None:
        """Compare with the reference weight format, loaded beside the case's own model."""
        run, reference = self.run, dict(self.case.params["reference"])
        own_weights = reference["quantization"] == self.case.quantization
        if own_weights and format_of(self.case) is None:
            self._without_divergence("this is the reference")
            return
        session = self.session
        if not isinstance(session, ComparesWindows):
            self._without_divergence(str(lacking(session, ComparesWindows)))
            return
        if own_weights:
            # the same model, with and without its packed cache
            self._compare(session, session, reference)
            return
        case = replace(self.case, quantization=reference["quantization"], dtype=reference["dtype"])
        try:
            beside = run.beside(case, threads=self.session.effective.get("threads"))
        except CaseSkipped as skip:
            self._without_divergence(f"the reference cannot run: {skip}")
            return
        try:
            self._compare(session, beside, reference)
        finally:
            beside.close()

    def _compare(self, session: ComparesWindows, beside: Session, reference: Mapping[str, Any]) -> None:
        found = []
        for index, text in enumerate(self.texts.texts):
            report = functools.partial(self._report, f"comparing text {index + 1}/{len(self.texts.texts)}")
            found.append(session.compare_windows(beside, text.tokens, text.windows, **self._prefix, progress=report))
        self._divergence(joined_divergence(found), reference["quantization"] or "none", reference["dtype"])

    @property
    def _all_weights(self) -> list[float] | None:
        lists = [weights for weights in self._weights if weights is not None]
        return [weight for weights in lists for weight in weights] if lists else None

    @property
    def _prefix(self) -> dict[str, Any]:
        return {"prefix": self.texts.rule, "prefix_token": self.texts.prefix_token}

    def _report(self, phase: str, done: int, of: int, mean: float) -> None:
        self.run.progress(phase, done, of, f", perplexity so far {math.exp(min(mean, 700.0)):.3f}")

    def _per_word(self, nll_sum: float) -> None:
        counts = [text.counts for text in self.texts.texts]
        names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        if len(counts) != 1 or counts[0] is None:
            for name in names:
                self.run.found.put(
                    name, None, reason="several texts, or a tokenizer that does not say which characters it cut"
                )
            return
        for name in names:
            try:
                self.run.found.put(name, getattr(counts[0], name)(nll_sum))
            except NoExponential as reason:
                self.run.found.put(name, None, reason=str(reason))

    def _divergence(self, tokens: TokenDivergence, reference: str, dtype: str) -> None:
        if reason := not_finite(tokens.nll_reference, dtype, "losses of the reference"):
            self._without_divergence(reason)
            return
        put = functools.partial(self.run.found.put, reference=reference, reference_dtype=dtype)
        put_divergence(self.run.found, tokens, reference=reference, reference_dtype=dtype)
        weights = self._all_weights
        ours, theirs = perplexity(tokens.nll, weights), perplexity(tokens.nll_reference, weights)
        pair = paired_ratio(tokens.nll, tokens.nll_reference, weights)
        put("perplexity_reference", theirs.value)
        put("delta_perplexity", ours.value - theirs.value)
        put("ppl_ratio_reference", pair.ratio)
        put("ppl_ratio_reference_se", pair.standard_error, reason="one token only")

    def _without_divergence(self, reason: str) -> None:
        for name in _DIVERGENCE:
            self.run.found.put(name, None, reason=reason)

    def _refuse_a_second_result(self, rule: WindowRule) -> None:
        for other in self.run.planned:
            if other == self.case:
                return
            if _but_for_the_text(other) == _but_for_the_text(self.case):
                texts = self.run.texts.windowed(self.session, other.workload, rule)
                if texts.revision == self.texts.revision:
                    name = other.workload["dataset"]
                    raise CaseSkipped(f"the same text as {name}, whose result it is: never two results of one text")


def _but_for_the_text(case: Case) -> Case:
    return replace(case, name="", workload={**case.workload, "dataset": ""})
