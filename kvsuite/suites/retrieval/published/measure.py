"""One case of a published task: scored by its own rules, beside the full cache on the same samples."""

from __future__ import annotations

import functools
from statistics import fmean
from weakref import WeakKeyDictionary

from kvsuite.cache_formats.chosen_format import format_of
from kvsuite.case import Case, digest
from kvsuite.engines.capabilities import AnswersQuestions, lacking
from kvsuite.engines.engine import Session
from kvsuite.errors import CaseInvalid
from kvsuite.measure.case_run import CaseRun
from kvsuite.suites.retrieval.cases import SEEN
from kvsuite.suites.retrieval.memory import measure_context_memory, put_weights
from kvsuite.suites.retrieval.options import RetrievalOptions
from kvsuite.suites.retrieval.scores import Mean

from .chosen_tasks import chosen_tasks
from .published_task import Asking, PublishedTask, ScoredTask

METRICS = ("task_score", "task_score_se", "task_score_full", "task_score_diff", "task_score_diff_se")
#: what the full cache scores on each session's tasks, by task and count: every method is compared with it
_FULL: WeakKeyDictionary[Session, dict[tuple[str, int], ScoredTask]] = WeakKeyDictionary()


def measure_published(case: Case, session: Session, run: CaseRun) -> None:
    """Score the task behind the case's cache, then the memory of its longest context.

    Raises
    ------
    CaseInvalid
        If the model has random weights or no tokenizer, or the task cannot be asked.
    """
    if session.model["is_dummy"]:
        raise CaseInvalid(
            f"--kv-model={case.model}: random weights, so the answers of a task say nothing; give a model with trained ones"
        )
    if session.tokenizer is None:
        raise CaseInvalid("--kv-model: the model has no tokenizer, so nothing can be asked; give a model with one")
    put_weights(session, run)
    if reason := lacking(session, AnswersQuestions):
        for name in METRICS:
            run.found.put(name, None, reason=reason)
        return
    task = chosen_tasks(run.options)[str(case.workload["task"])]
    count = int(case.workload["num_samples"])
    run.phase("quality")
    full = _full(case, session, run, task, count)
    is_full = case.policy is None and format_of(case) is None
    asking = Asking(
        session, case,
        question_seen=not task.in_one_piece and case.params["question"] == SEEN,
        progress=functools.partial(run.progress, "asking"),
    )  # fmt: skip
    found = full if is_full else task.score(asking, count, full)
    _put(run, found, full, is_full=is_full)
    run.found.samples[task.kind] = found.facts | {"full": full.facts.get("metrics")} if not is_full else found.facts
    run.found.samples["answers"] = found.rows
    run.found.warnings += found.warnings
    run.found.dataset_revision = digest(found.hashes)
    run.found.dataset = {
        "name": str(case.workload["task"]),
        "source": task.kind,
        "revision": found.facts.get("task_version"),
        "text_hash": run.found.dataset_revision,
        "tokens_hash": run.found.dataset_revision,
        "join_rule": "the task's own prompts",
        "texts": len(found.hashes),
        "notes": [],
    }
    measure_context_memory(session, run, found.longest)


def _full(case: Case, session: Session, run: CaseRun, task: PublishedTask, count: int) -> ScoredTask:
    """Scores of the full cache in the model's dtype, computed once for all methods of a session."""
    held = _FULL.setdefault(session, {})
    if (task.name, count) not in held:
        asking = Asking(session, case, full=True, progress=functools.partial(run.progress, "full cache"))
        held[task.name, count] = task.score(asking, count)
    return held[task.name, count]


def _put(run: CaseRun, found: ScoredTask, full: ScoredTask, *, is_full: bool) -> None:
    put, bound = run.found.put, run.options.of(RetrievalOptions).task_bound
    put("task_context_tokens", fmean(found.contexts), contexts=len(found.contexts))
    put("task_kept_tokens", fmean(found.kept), contexts=len(found.kept))
    if found.scores is None or full.scores is None:
        for name in METRICS:
            put(name, None, reason=found.reason)
        return
    if (found.facts["score"], found.hashes) != (full.facts["score"], full.hashes):
        raise CaseInvalid(
            "the task asked this cache otherwise than the full one (its samples or its metric differ), so the scores cannot be "
            "compared; give a task that draws nothing anew"
        )
    own, ceiling = Mean.of(found.scores), Mean.of(full.scores).value
    facts = {
        "questions": len(found.scores),
        "bound": bound,
        "discriminative": ceiling >= bound,
        "rule": found.facts["score"],
    }
    put("task_score", own.value, **facts)
    put("task_score_se", own.error, reason="one sample only")
    put("task_score_full", ceiling, questions=len(full.scores))
    difference = Mean.of([ours - theirs for ours, theirs in zip(found.scores, full.scores, strict=True)])
    reason = "this is the reference" if is_full else "one sample only"
    put("task_score_diff", None if is_full else difference.value, reason=reason)
    put("task_score_diff_se", None if is_full else difference.error, reason=reason)
    # a row a sample, by which a comparison pairs two runs; nobody has a loss of an answer here
    run.found.sidecar = {
        "text": list(range(len(found.scores))),
        "position": [0] * len(found.scores),
        "token": [int(one.removeprefix("sha256:")[:8], 16) for one in found.hashes],
        "nll": [None] * len(found.scores),
        "correct": found.scores,
    }
    if ceiling < bound:
        run.found.warnings.append(
            f"not discriminative: the full cache scores {ceiling:.2f}, less than --kv-task-bound={bound:g}"
        )
