"""What a case's cache predicts beside the full one, by one forward pass a text; mixed assignments are built and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from kvsuite.cache_formats.by_layer import OwnFormat
from kvsuite.cache_formats.chosen_format import PARAMETER
from kvsuite.case import Case
from kvsuite.engines.capabilities import ScoresInOnePass, lacking
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.divergence import CACHE_DIVERGENCE, put_cache_divergence
from kvsuite.measure.pooled import not_finite, put_perplexity
from kvsuite.memory_model.config import architecture_of
from kvsuite.meters.divergence import TokenDivergence, joined_divergence
from kvsuite.meters.quality import TokenScores, paired_ratio
from kvsuite.meters.reference_rows import RowComparison
from kvsuite.models.layers import ModelLayers
from kvsuite.options.paths import expanded

from .assignment import Assignment, Lowering, TextBytes, lowerings, mixed
from .cases import MIXED, Formats

_REFERENCE = "full cache in the model's dtype, one forward pass"


@dataclass(frozen=True)
class ScoredCache:
    """What a cache predicts of all texts.

    Parameters
    ----------
    scores
        By text.
    tokens
        Beside the full cache in the model's dtype; ``None`` of that cache itself.
    kv_bytes
        Of the cache of a text, mean.
    """

    scores: list[TokenScores]
    tokens: TokenDivergence | None
    kv_bytes: float


#: what was scored on a loaded model, by the format and the texts: a mixed assignment builds on the layers' cases
_scored: WeakKeyDictionary[Session, dict[tuple[str, str], ScoredCache]] = WeakKeyDictionary()


class CacheScorer:
    """Scores the texts of a case through caches of any format.

    Parameters
    ----------
    run
        The case's.
    session
        The loaded engine.

    Raises
    ------
    CaseInvalid
        If the engine cannot, or the predictions of the full cache are not finite.
    UserError
        If a text is too short.
    """

    def __init__(self, run: CaseRun, session: Session) -> None:
        if not isinstance(session, ScoresInOnePass):
            raise CaseInvalid(f"no divergence: {lacking(session, ScoresInOnePass)}")
        self.session: Session = session
        self._run, self._scorer = run, session
        workload = run.case.workload
        self.texts = run.texts.scored(session, workload, tokens=int(workload["max_tokens"]))
        run.found.dataset = self.texts.facts
        self._known = _scored.setdefault(session, {})

    def scored(self, case: Case) -> ScoredCache:
        """What the cache of ``case`` predicts; the session is prepared for it."""
        self.session.prepare(case)
        key = str(case.params.get(PARAMETER)), self.texts.revision
        if key not in self._known:
            self._known[key] = self._score(is_full=PARAMETER not in case.params)
        return self._known[key]

    def in_format(self, chosen: OwnFormat | None) -> ScoredCache:
        """What the cache of the case in another format predicts."""
        return self.scored(_in_format(self._run.case, chosen))

    def _score(self, *, is_full: bool) -> ScoredCache:
        scores, compared, sizes = [], [], []
        for tokens in self.texts.tokens:
            rows = self._run.texts.whole_rows(self.session, tokens)
            assert rows.scores is not None
            if broken := not_finite(rows.scores.nll, self.session.dtype_name, "losses of the full cache"):
                raise CaseInvalid(broken)
            if is_full:
                scores.append(rows.scores)
                sizes.append(self._scorer.planned_whole_bytes(len(tokens)))
                continue
            arm = RowComparison(rows)
            found = self._scorer.score_whole(tokens, arm.add, full=False)
            scores.append(found.tokens)
            compared.append(arm.found(found.tokens))
            sizes.append(found.kv_bytes)
        return ScoredCache(scores, joined_divergence(compared) if compared else None, sum(sizes) / len(sizes))


def measure_sensitivity(case: Case, session: Session, run: CaseRun) -> None:
    """Fill ``run.found`` with what the case's cache predicts, beside the full cache and beside the base format.

    Raises
    ------
    CaseInvalid
        If a loss is not finite, or a budget is below the smallest formats or above the base.
    """
    scorer = CacheScorer(run, session)
    run.phase("scoring")
    params, prepared = case.params, case
    of = _layers(case, run)
    formats = Formats.named(str(params["base"]), tuple(params.get("formats", ()))) if "base" in params else None
    if params["kind"] == MIXED:
        assert formats is not None
        assignment = _assignment(scorer, case, run, of, formats)
        prepared = _in_format(case, assignment.format)
        run.found.samples["assignment"] = _names(assignment)
    scored = scorer.scored(prepared)
    _put(run, session, scored, TextBytes(of, int(case.workload["max_tokens"]), _element_bytes(session)))
    if scored.tokens is not None:
        put_cache_divergence(run.found, scored.tokens, reference=_REFERENCE)
        run.found.sidecar |= {"kld": scored.tokens.kld, "same_top1": scored.tokens.same_top1}  # type: ignore[operator]
    else:
        for name in CACHE_DIVERGENCE:
            run.found.put(name, None, reason="this is the reference")
    if formats is not None:
        base = scorer.in_format(formats.base_assignment(len(of.layers)).format)
        _put_beside_base(run, scored, base, str(params["base"]))
        # the record tells what the session applied to the case, not to the base
        session.prepare(prepared)
    run.found.dataset_revision = scorer.texts.revision


def _assignment(scorer: CacheScorer, case: Case, run: CaseRun, of: ModelLayers, formats: Formats) -> Assignment:
    """The mixed assignment of a case: every layer's keys and values alone first, as far as they are not known."""
    size = TextBytes(of, int(case.workload["max_tokens"]), _element_bytes(scorer.session))
    alone = lowerings(of, formats.lower)
    plain, base = Assignment.uniform(len(of.layers)), formats.base_assignment(len(of.layers))
    divergences: dict[Lowering, float] = {}
    for done, lowering in enumerate(alone):
        found = scorer.in_format(plain.lowered(lowering).format).tokens
        assert found is not None
        divergences[lowering] = sum(found.kld) / len(found.kld)
        run.progress("each layer alone", done + 1, len(alone))
    number, unit = float(case.params["budget"]), str(case.params["unit"])
    most = size.budget(number, unit)
    typed = f"--kv-sensitivity-budget={number:g}{'%' if unit == 'share' else ''}"
    if most >= size(base):
        raise CaseInvalid(
            f"{typed}: {case.params['base']} for all layers takes {size.bits(size(base)):.4g} bits an element, so there is "
            "nothing to lower; give less"
        )
    assignment = mixed(base, divergences, size, most)
    if assignment is None:
        least = min(size(Assignment.uniform(len(of.layers), *pair)) for pair in formats.lower)
        raise CaseInvalid(
            f"{typed}: {', '.join(case.params['formats'])} for all layers takes {size.bits(least):.4g} bits an element; give "
            "more, or a smaller format to --kv-sensitivity"
        )
    return assignment


def _put(run: CaseRun, session: Session, scored: ScoredCache, size: TextBytes) -> None:
    nll = [x for one in scored.scores for x in one.nll]
    hits = [hit for one in scored.scores for hit in one.correct]
    tokens = int(run.case.workload["max_tokens"])
    put_perplexity(run.found, nll, sum(hits) / len(hits), dtype=session.dtype_name, protocol="one forward pass")
    assert isinstance(session, ScoresInOnePass)
    run.found.put("kv_bytes_exact", scored.kv_bytes)
    run.found.put("mem_predicted_kv_bytes", session.planned_whole_bytes(tokens))
    run.found.put("kv_bits", size.bits(round(scored.kv_bytes)))
    run.found.tokens |= {"text": tokens * len(scored.scores), "scored": len(nll)}
    run.found.sidecar = {
        "text": [index for index, one in enumerate(scored.scores) for _ in one.nll],
        "position": [at for one in scored.scores for at in one.positions],
        "token": [token for one in scored.scores for token in one.targets],
        "nll": nll,
        "correct": hits,
    }


def _put_beside_base(run: CaseRun, scored: ScoredCache, base: ScoredCache, name: str) -> None:
    """The divergence less that of the base on the same tokens, paired."""
    if scored.tokens is None or base.tokens is None or scored is base:
        for metric in ("kld_difference", "kld_difference_se"):
            run.found.put(
                metric, None, reason="this is the base" if scored is base else "the full cache has no divergence"
            )
        return
    pair = paired_ratio(scored.tokens.kld, base.tokens.kld)
    run.found.put("kld_difference", pair.mean_difference, base=name)
    run.found.put("kld_difference_se", pair.difference_se, reason="one token only")


def _names(assignment: Assignment) -> list[str]:
    """The format of each layer, as ``by_layer(FILE.json)`` reads them."""
    pairs = zip(assignment.keys, assignment.values, strict=True)
    return [str(Assignment.uniform(1, *pair).format or "auto") for pair in pairs]


def _in_format(case: Case, chosen: OwnFormat | None) -> Case:
    params: Mapping[str, Any] = {name: value for name, value in case.params.items() if name != PARAMETER}
    return replace(case, params=dict(params) if chosen is None else {**params, PARAMETER: str(chosen)})


def _layers(case: Case, run: CaseRun) -> ModelLayers:
    cache_dir = None if run.common.cache_dir is None else expanded(run.common.cache_dir)
    found = architecture_of(case.model, cache_dir=cache_dir).cache
    if isinstance(found, str):
        raise CaseInvalid(f"the layers of {case.model} are not known: {found}")
    return found


def _element_bytes(session: Session) -> int:
    return 4 if session.dtype_name == "float32" else 2
