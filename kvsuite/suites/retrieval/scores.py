"""Scores of answers: exact match, share of tokens, log-probability; means over samples with errors, cells by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from kvsuite.engines.questions import Answer, Asked

from .samples import ContextSample, SampleQuestion

#: half a 95 % interval in standard errors
_Z = 1.96


@dataclass(frozen=True)
class Score:
    """One answer's.

    Parameters
    ----------
    exact
        1 where every token is the right one, else 0.
    share
        Of the answer's tokens, those that are right at their place.
    logprob
        Mean log-probability of the right answer's tokens, in nats.
    """

    exact: float
    share: float
    logprob: float

    @classmethod
    def of(cls, answer: Answer, right: Sequence[int]) -> Score:
        """Compare what was answered with the right tokens."""
        hits = [ours == theirs for ours, theirs in zip(answer.output, right, strict=True)]
        return cls(float(all(hits)), fmean(hits), -fmean(answer.nll))


@dataclass(frozen=True)
class ScoredAnswer:
    """One question of a sample, its answer's score, and what was said."""

    sample: int
    known: SampleQuestion
    score: Score
    output: list[int]


@dataclass(frozen=True)
class Mean:
    """Mean over samples and its standard error, ``None`` for a single one."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of independent values."""
        return cls(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)


def score_answers(samples: Sequence[ContextSample], answers: Sequence[Sequence[Answer]]) -> list[ScoredAnswer]:
    """Scores of all questions, in order; ``answers`` are those of all contexts of all samples."""
    waiting = iter(answers)
    found = []
    for index, sample in enumerate(samples):
        for asked, known in zip(sample.asked, sample.known, strict=True):
            for question, what, answer in zip(asked.questions, known, next(waiting), strict=True):
                found.append(ScoredAnswer(index, what, Score.of(answer, question.answer), answer.output))
    return found


def by_sample(scored: Sequence[ScoredAnswer], of: Callable[[Score], float]) -> list[float]:
    """Mean of each sample's questions: these hang together, samples do not."""
    groups: dict[int, list[float]] = {}
    for one in scored:
        groups.setdefault(one.sample, []).append(of(one.score))
    return [fmean(group) for group in groups.values()]


def cells(scored: Sequence[ScoredAnswer], full: Sequence[ScoredAnswer], bound: float) -> list[dict[str, Any]]:
    """Scores by depth beside the full cache's of the same questions, in JSON types.

    ``discriminative`` is whether the full cache answers at least ``bound`` of them exactly.
    """
    found = []
    depths = list(dict.fromkeys(one.known.depth for one in scored))
    for depth in sorted(depths, key=lambda one: -1.0 if one is None else one):
        own, reference = ([one for one in side if one.known.depth == depth] for side in (scored, full))
        exact, exact_full = (Mean.of(by_sample(side, lambda one: one.exact)) for side in (own, reference))
        logprobs = by_sample(own, lambda one: one.logprob)
        logprob, paired = Mean.of(logprobs), by_sample(reference, lambda one: one.logprob)
        difference = Mean.of([ours - theirs for ours, theirs in zip(logprobs, paired, strict=True)])
        behind = [one.known.behind for one in own if one.known.behind is not None]
        found.append(
            {
                "depth": depth,
                "samples": len(logprobs),
                "tokens_behind": fmean(behind) if behind else None,
                "exact": exact.value,
                "exact_interval": list(wilson(exact.value, len(logprobs))),
                "share": fmean(by_sample(own, lambda one: one.share)),
                "logprob": logprob.value,
                "logprob_se": logprob.error,
                "exact_full": exact_full.value,
                "logprob_diff": difference.value,
                "logprob_diff_se": difference.error,
                "discriminative": exact_full.value >= bound,
            }
        )
    return found


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` by Wilson's score: it is none of width 0 at 0 and 1."""
    centre = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def with_question(asked: Asked) -> list[Asked]:
    """The same questions with each inside a context of its own, but for its last token, which the answer follows."""
    return [
        Asked([*asked.context, *one.tokens[:-1]], (replace(one, tokens=one.tokens[-1:]),)) for one in asked.questions
    ]
