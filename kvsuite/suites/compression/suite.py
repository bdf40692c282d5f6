"""The compression suite: what cache eviction costs in quality, and what it saves in memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import stacked
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row, json_bytes
from kvsuite.suites.suite import Suite, Work, served_work

from .cases import compression_cases, method_name, scores_reference, unread_options
from .options import CompressionOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement


class CompressionSuite(Suite):
    """Policies and presses beside the full cache, one request at a time."""

    name = "compression"
    headline = (
        "perplexity", "ttft_s", "tpot_s", "kv_bytes_exact", "decode_tok_s_agg", "mem_measured_peak_bytes",
    )  # fmt: skip
    bare_run_place = 1
    measures_by_hand = True
    option_group = CompressionOptions

    def cases(self, options: Options) -> list[Case]:
        return compression_cases(options)

    def run_name(self, options: Options) -> str:
        return method_name(options)

    def unread_options(self, options: Options) -> list[str]:
        return unread_options(options)

    def cost(self, case: Case, options: Options) -> Work:
        work = served_work(case, options)
        if case.model.startswith("dummy:"):
            # random weights have no quality to score
            return work
        # once through the cache, token by token, and once through the full one
        scored = int(case.workload["max_tokens"]) * int(case.workload["num_samples"])
        return work + Work(scored, 2 * scored if scores_reference(case, options) else scored)

    def needs(self, case: Case) -> tuple[type, ...]:
        from kvsuite.engines.capabilities import AppliesPolicy

        return () if case.policy is None else (AppliesPolicy,)

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        from kvsuite.measure.single_request import measure_single_request

        from .quality import score_through_cache

        measure_single_request(session, run, lambda timed: score_through_cache(run, session))
        return run.found

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
        from .table import comparison_legend, comparison_table

        return stacked([comparison_table(rows)], comparison_legend(rows).splitlines())

    def files(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, str]:
        from .results_json import results_json

        return {"results.json": json_bytes(results_json(run, rows), "results.json").decode()}

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        from .divergence_figure import render_divergence
        from .figure import render_benchmark_comparison

        return render_benchmark_comparison(run, rows) | render_divergence(run, rows)
