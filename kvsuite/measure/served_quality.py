"""Quality of what was served under load: a continuation forced through the same pool, arrivals and policy, against dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

from kvsuite.engines.results import OutputScores, Served, ServeRequest
from kvsuite.meters.quality import paired_ratio, perplexity
from kvsuite.meters.served_divergence import kl_divergences, rest_probability
from kvsuite.metrics.registry import percentile

from .measurement import Measurement
from .pooled import not_finite

#: bytes of the dense run's log-probabilities that are kept: all of the vocabulary where they fit
_ROW_BYTES = 2**28
_FEWEST_ROWS = 64
_ENTRY_BYTES = 8

METRICS = (
    "served_perplexity", "served_perplexity_dense", "served_ppl_ratio", "served_ppl_ratio_se", "served_kld",
    "served_kld_p99", "served_kld_max", "served_kld_rest", "served_same_top1",
)  # fmt: skip


class ServingSession(Protocol):
    """What is needed of a session: `kvsuite.engines.capabilities.ServesUnderLoad` and its facts."""

    def serve_under_load(self, requests: Sequence[ServeRequest], *, concurrency: int | None = None) -> Served: ...

    def serve_dense(self, requests: Sequence[ServeRequest]) -> Served: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def dtype_name(self) -> str: ...


@dataclass(frozen=True)
class DenseRun:
    """Continuations and their dense scores, to which any number of variants is compared.

    Parameters
    ----------
    outputs
        Of each request: what the dense run chose greedily, or what was forced.
    scores
        The dense run's, with log-probabilities of its likeliest tokens.
    """

    outputs: list[list[int]]
    scores: list[OutputScores]


@dataclass(frozen=True)
class RequestQuality:
    """One request's continuation as served and dense, position by position, the first left out.

    The first token comes of the prompt's own rows, before anything is compressed.
    """

    nll: list[float]
    nll_dense: list[float]
    kld: list[float]
    same_top1: list[bool]

    def to_dict(self) -> dict[str, Any]:
        """Summary of the request in JSON types."""
        ratio = paired_ratio(self.nll, self.nll_dense)
        return {
            "positions": len(self.nll),
            "perplexity": perplexity(self.nll).value,
            "perplexity_dense": perplexity(self.nll_dense).value,
            "ppl_ratio": ratio.ratio,
            "kld": fmean(self.kld),
            "kld_p99": percentile(self.kld, 0.99),
            "kld_max": max(self.kld),
            "same_top1": fmean(self.same_top1),
        }


def serve_dense(session: ServingSession, requests: Sequence[ServeRequest]) -> DenseRun:
    """Serve requests with their full caches, and keep what their continuations are compared with.

    The continuation of a request is what `ServeRequest.forced` says (text of a corpus), or what the dense run chooses
    greedily. Of every position the log-probabilities of the ``k`` likeliest tokens are kept, and that of all others
    together: ``k`` is the whole vocabulary where that takes no more than 256 MiB for all requests, and at least 64. With fewer
    than all the divergences are lower bounds (`kvsuite.meters.served_divergence`), and ``served_kld_rest`` says of how much
    probability they see only the sum.

    Parameters
    ----------
    session
        Of the model; whatever case it is prepared for.
    requests
        As they will be served under load. Their arrivals do not matter.
    """
    positions = sum(one.new_tokens for one in requests)
    width = min(session.vocab_size, max(_FEWEST_ROWS, _ROW_BYTES // (_ENTRY_BYTES * positions)))
    served = session.serve_dense([replace(one, rows=width) for one in requests])
    return DenseRun(served.outputs, [_scores(one.scores) for one in served.requests])


def compare_served(
    session: ServingSession, requests: Sequence[ServeRequest], dense: DenseRun, *, concurrency: int | None = None
) -> list[RequestQuality]:
    """Force the dense run's continuations through the prepared case, and compare request by request.

    Pool, arrivals, policy, preemptions: all is as when the requests are served for their times, but for the tokens, which are
    those of the dense run. So a divergence is what the cache alone has changed, at every position for itself.

    Parameters
    ----------
    session
        Prepared for the case.
    requests
        The same as of ``dense``.
    dense
        `serve_dense`.
    concurrency
        As for `kvsuite.engines.capabilities.ServesUnderLoad`.
    """
    forced = []
    for one, output, scores in zip(requests, dense.outputs, dense.scores, strict=True):
        assert scores.rows is not None
        forced.append(replace(one, forced=output, rows=scores.rows.ids))
    served = session.serve_under_load(forced, concurrency=concurrency)
    return [
        _compared(_scores(one.scores), reference) for one, reference in zip(served.requests, dense.scores, strict=True)
    ]


def put_served_quality(
    found: Measurement,
    session: ServingSession,
    requests: Sequence[ServeRequest],
    dense: DenseRun,
    *,
    concurrency: int | None = None,
) -> None:
    """Measure the quality of the served continuation of a prepared case, and write it: pooled, and request by request.

    Parameters
    ----------
    found
        Takes the metrics; ``samples["served_quality"]`` has a row for each request.
    session, requests, dense, concurrency
        As for `compare_served`.
    """
    compared = compare_served(session, requests, dense, concurrency=concurrency)
    nll, reference, kld, same = (
        [value for one in compared for value in getattr(one, name)] for name in ("nll", "nll_dense", "kld", "same_top1")
    )
    reason = (
        "one token a request: nothing is computed from what is in the cache"
        if not nll
        else not_finite(nll, session.dtype_name) or not_finite(reference, session.dtype_name, "losses of the dense run")
    )
    if reason:
        for name in METRICS:
            found.put(name, None, reason=reason)
        return
    ratio = paired_ratio(nll, reference)
    rows = [scores.rows for scores in dense.scores if scores.rows is not None]
    facts = {"positions": len(nll), "top": int(rows[0].ids.shape[1])}
    found.put("served_perplexity", perplexity(nll).value, **facts)
    found.put("served_perplexity_dense", perplexity(reference).value, **facts)
    found.put("served_ppl_ratio", ratio.ratio, **facts)
    found.put("served_ppl_ratio_se", ratio.standard_error, reason="one position only")
    found.put("served_kld", fmean(kld), **facts)
    found.put("served_kld_p99", percentile(kld, 0.99), reason=f"{len(kld)} positions; a p99 takes 100", **facts)
    found.put("served_kld_max", max(kld), **facts)
    found.put("served_kld_rest", fmean(map(rest_probability, rows)), **facts)
    found.put("served_same_top1", fmean(same), **facts)
    found.samples["served_quality"] = [one.to_dict() if one.nll else None for one in compared]


def _compared(arm: OutputScores, dense: OutputScores) -> RequestQuality:
    assert arm.rows is not None
    assert dense.rows is not None
    return RequestQuality(
        arm.nll[1:],
        dense.nll[1:],
        kl_divergences(dense.rows, arm.rows)[1:],
        [ours == theirs for ours, theirs in zip(arm.top1[1:], dense.top1[1:], strict=True)],
    )


def _scores(scores: OutputScores | None) -> OutputScores:
    assert scores is not None
    return scores
