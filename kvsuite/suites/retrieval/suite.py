"""The retrieval suite: tasks that say whether a cache still holds what its context said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import stacked
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row
from kvsuite.suites.suite import Suite, Work

from .cases import FULL, REUSE, is_published, retrieval_cases, takes_weights
from .options import RetrievalOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement


class RetrievalSuite(Suite):
    """Contexts are prefilled, their caches compressed, and only then they are asked."""

    name = "retrieval"
    headline = ("retrieval_exact", "retrieval_logprob", "retrieval_share", "kv_bytes_exact_prefill", "task_score")
    option_group = RetrievalOptions

    def cases(self, options: Options) -> list[Case]:
        return retrieval_cases(options)

    def check(self, options: Options) -> None:
        from .published.chosen_tasks import chosen_tasks

        chosen_tasks(options)

    def unread_options(self, options: Options) -> list[str]:
        own = options.of(RetrievalOptions)
        unread = set() if own.task else {"task_lengths", "task_depths"}
        if not takes_weights(own):
            unread.add("compressor_path")
        return [f"--kv-{name.replace('_', '-')}" for name in sorted(unread & options.given)]

    def cost(self, case: Case, options: Options) -> Work:
        if is_published(case):
            from .published.chosen_tasks import chosen_tasks

            used, letters = chosen_tasks(options)[str(case.workload["task"])].size(int(case.workload["num_samples"]))
            # the full cache's prompts too, where nobody else computes them
            return Work(2 * letters // _LETTERS, used * _STEPS)
        length, count = int(case.workload["prompt_tokens"]), int(case.workload["num_samples"])
        if case.model.startswith("dummy:"):
            # random weights have no quality to score
            return Work(length, 1)
        # the memory pass, the contexts, and the full cache's where nobody else computes them
        passes = 1 + count * (1 if case.params["method"] == FULL else 2)
        steps = count * len(case.workload["depths"]) * _STEPS
        return Work(passes * length, steps // max(1, _TOGETHER // length))

    def needs(self, case: Case) -> tuple[type, ...]:
        from kvsuite.engines.capabilities import AppliesPolicy, ServesUnderLoad

        served = (ServesUnderLoad,) if case.workload["task"] == REUSE else ()
        return served if case.policy is None else (*served, AppliesPolicy)

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        if is_published(case):
            from .published.measure import measure_published

            measure_published(case, session, run)
        elif case.workload["task"] == REUSE:
            from .reuse import measure_reuse

            measure_reuse(case, session, run)
        else:
            from .measure import measure_retrieval

            measure_retrieval(case, session, run)
        return run.found

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        from .figures import retrieval_figures

        return retrieval_figures(run, rows)

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
        from .table import retrieval_legend, retrieval_table

        return stacked([retrieval_table(rows)], retrieval_legend(rows))


# tokens of a question and its answer that are fed one by one
_STEPS = 24
# letters of a token, about
_LETTERS = 4
# tokens of contexts that share these steps, about what engines compute together on a CPU
_TOGETHER = 2560
