"""One case: contexts are prefilled, their caches treated, then they are asked; scored beside the full cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from weakref import WeakKeyDictionary

from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.case import Case, digest
from kvsuite.compression import get_policy
from kvsuite.engines.capabilities import AnswersQuestions, lacking
from kvsuite.engines.engine import Session
from kvsuite.engines.questions import Answer, Asked
from kvsuite.engines.results import ServeRequest
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.measure.pooled import not_finite
from kvsuite.workloads.prompts import make_prompts

from .cases import SEEN
from .memory import FED_TOKENS, measure_context_memory, put_weights
from .options import RetrievalOptions
from .samples import ContextSample
from .sampling import require_room, retrieval_samples
from .scores import Mean, ScoredAnswer, by_sample, cells, score_answers, with_question

_exact, _logprob = attrgetter("exact"), attrgetter("logprob")
METRICS = (
    "retrieval_exact", "retrieval_exact_se", "retrieval_share", "retrieval_logprob", "retrieval_logprob_se",
    "retrieval_exact_full", "retrieval_logprob_full", "retrieval_exact_diff", "retrieval_exact_diff_se",
    "retrieval_logprob_diff", "retrieval_logprob_diff_se",
)  # fmt: skip
#: what the full cache answers to each session's samples, by their hash: every method of a task is compared with it
_FULL: WeakKeyDictionary[Session, dict[str, list[list[Answer]]]] = WeakKeyDictionary()


def measure_retrieval(case: Case, session: Session, run: CaseRun) -> None:
    """Score the case's answers, then its memory.

    Raises
    ------
    CaseInvalid
        If a context is longer than the model takes, cannot say what it should, or an answer cannot be scored.
    """
    length = int(case.workload["prompt_tokens"])
    require_room(session, length, FED_TOKENS)
    put_weights(session, run)
    reason = "random weights" if session.model["is_dummy"] else lacking(session, AnswersQuestions)
    if session.model["is_dummy"]:
        run.found.inert["task"] = "random weights: nothing is asked, and the context is random tokens"
        [context] = make_prompts(
            count=1, length=length, vocab_size=session.vocab_size, seed=run.common.seed, token_pool=None
        )
    elif reason is None:
        context = _score(case, session, run)
    if reason is not None:
        for name in METRICS:
            run.found.put(name, None, reason=reason)
        if not session.model["is_dummy"]:
            return
    request = measure_context_memory(session, run, context)
    if session.model["is_dummy"]:
        run.phase("decode")
        _time(session, run, request)


def _time(session: Session, run: CaseRun, request: ServeRequest) -> None:
    """Times to the first token, where answers say nothing."""
    clock = session.clock(run.clock(session.device))
    session.serve([request])
    seconds: list[float] = []
    run.rounds(lambda: seconds.append(session.serve([request], clock).times[0].ttft_s), run.common.rounds)
    run.found.put("ttft_s", seconds, clock=clock.name)


def _score(case: Case, session: Session, run: CaseRun) -> list[int]:
    """Ask, compare and write; the first context."""
    assert isinstance(session, AnswersQuestions)
    run.phase("quality")
    samples = retrieval_samples(case, session, run)
    require_room(session, int(case.workload["prompt_tokens"]), max(one.steps for s in samples for one in s.asked))
    asked = [one for sample in samples for one in sample.asked]
    sees, is_full = case.params["question"] == SEEN, case.policy is None and format_of(case) is None
    full = _full(session, run, samples, asked)
    if is_full:
        answers = full
    elif sees:
        answers = _asked_inside(session, run, asked)
    else:
        answers = session.answer(asked, full=False, progress=functools.partial(run.progress, "asking"))
    nll = [x for one in answers for answer in one for x in answer.nll]
    if broken := not_finite(nll, session.dtype_name, "losses of the right answers"):
        raise CaseInvalid(broken)
    _put(run, session, score_answers(samples, answers), score_answers(samples, full), is_full=is_full)
    _put_sidecar(run, samples, score_answers(samples, answers))
    if case.policy is not None and not case.policy.startswith("kvpress:"):
        told = get_policy(case.policy, **case.policy_params).caveat(int(case.workload["prompt_tokens"]))
        if told:
            run.found.warnings.append(f"not what its name says: {told}")
    return list(asked[0].context)


def _full(
    session: AnswersQuestions, run: CaseRun, samples: Sequence[ContextSample], asked: Sequence[Asked]
) -> list[list[Answer]]:
    """Answers of the full cache in the model's dtype, computed once for all methods of a session."""
    assert isinstance(session, Session)
    held = _FULL.setdefault(session, {})
    name = digest([sample.hash for sample in samples])
    if name not in held:
        held[name] = session.answer(asked, full=True, progress=functools.partial(run.progress, "full cache"))
    return held[name]


def _asked_inside(session: AnswersQuestions, run: CaseRun, asked: Sequence[Asked]) -> list[list[Answer]]:
    """Answers where each question stands inside a prompt of its own."""
    apart = [with_question(one) for one in asked]
    flat = [one for group in apart for one in group]
    answers = iter(session.answer(flat, full=False, progress=functools.partial(run.progress, "asking inside")))
    return [[next(answers)[0] for _ in group] for group in apart]


def _put(
    run: CaseRun, session: Session, scored: Sequence[ScoredAnswer], full: Sequence[ScoredAnswer], *, is_full: bool
) -> None:
    found, bound = run.found, run.options.of(RetrievalOptions).task_bound
    exact, logprob = ([by_sample(side, of) for side in (scored, full)] for of in (_exact, _logprob))
    ceiling = Mean.of(exact[1]).value
    facts = {"contexts": len(exact[0]), "questions": len(scored), "bound": bound, "discriminative": ceiling >= bound}
    for name, (own, reference) in (("retrieval_exact", exact), ("retrieval_logprob", logprob)):
        mean = Mean.of(own)
        found.put(name, mean.value, **facts)
        found.put(f"{name}_se", mean.error, reason="one sample only")
        found.put(f"{name}_full", Mean.of(reference).value, contexts=len(reference))
        difference = Mean.of([ours - theirs for ours, theirs in zip(own, reference, strict=True)])
        reason = "this is the reference" if is_full else "one sample only"
        found.put(f"{name}_diff", None if is_full else difference.value, reason=reason)
        found.put(f"{name}_diff_se", None if is_full else difference.error, reason=reason)
    found.put("retrieval_share", Mean.of(by_sample(scored, lambda one: one.share)).value, **facts)
    found.samples["cells"] = cells(scored, full, bound)
    found.samples["answers"] = [
        {
            "sample": one.sample,
            "depth": one.known.depth,
            "tokens_behind": one.known.behind,
            "answer": one.known.answer,
            "output": session.tokenizer.decode(one.output).strip(),
            "exact": int(one.score.exact),
            "share": one.score.share,
            "logprob": one.score.logprob,
        }
        for one in scored
    ]
    if not facts["discriminative"]:
        found.warnings.append(
            f"not discriminative: the full cache answers {ceiling:.2f} exactly, less than --kv-task-bound={bound:g}"
        )


def _put_sidecar(run: CaseRun, samples: Sequence[ContextSample], scored: Sequence[ScoredAnswer]) -> None:
    """A row a sample, by which a comparison pairs two runs: ``nll`` and ``correct`` are means of its questions."""
    run.found.sidecar = {
        "text": list(range(len(samples))),
        "position": [0] * len(samples),
        # so that two runs pair where they asked the same
        "token": [int(sample.hash.removeprefix("sha256:")[:8], 16) for sample in samples],
        "nll": [-value for value in by_sample(scored, _logprob)],
        "correct": by_sample(scored, _exact),
    }
