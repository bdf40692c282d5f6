"""What a case of the pipeline suite computes, for plans and shards."""

from __future__ import annotations

from kvsuite.case import Case
from kvsuite.engines.serving_plan import BLOCK_TOKENS, ServingPlan
from kvsuite.options.common import CommonOptions
from kvsuite.suites.suite import Work

from .capacity import capacity_passes
from .cases import longest_request


def load_work(case: Case, common: CommonOptions, *, quality: bool) -> Work:
    """Warm-ups and rounds, each of which serves all requests; the two passes of quality where it is compared, and one for each
    rate at which a capacity is sought.

    How many requests decode at a time follows from the pool, and from what a factor leaves of a prompt.
    """
    plan = ServingPlan.of(case)
    requests = int(case.workload["requests"])
    prompt, new_tokens = longest_request(case)
    if plan is None or prompt < 1:
        return Work(0, 0)
    kept = prompt if case.policy is None else max(1, int(prompt // case.params["factor"]))
    fits = requests if plan.pool_blocks is None else max(1, plan.pool_blocks * BLOCK_TOKENS // (kept + new_tokens))
    running = min(requests, plan.max_num_seqs, fits)
    passes = common.num_warmup + common.rounds + (2 if quality and not case.model.startswith("dummy:") else 0)
    passes += capacity_passes(case)
    return Work(passes * requests * prompt, passes * -(-requests // running) * new_tokens)
