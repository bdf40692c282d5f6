"""The pipeline suite: what compression, lanes and SM shares bring under load, and what they cost in quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import stacked
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row
from kvsuite.suites.suite import Suite, Work

from .cases import PIPELINE, pipeline_cases, unread_options
from .options import PipelineOptions

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement
    from kvsuite.suites.footprint import Footprint


class PipelineSuite(Suite):
    """Requests under load in a pool of fixed size, by variants that compress, share the device, or both."""

    name = PIPELINE
    headline = (
        "output_tok_s",
        "goodput_req_s",
        "ttft_p50_s",
        "tpot_p50_s",
        "served_kld",
        "running_mean",
        "preemptions",
    )
    option_group = PipelineOptions

    def cases(self, options: Options) -> list[Case]:
        return pipeline_cases(options)

    def check(self, options: Options) -> None:
        from .files import check_list

        check_list(options.of(PipelineOptions).pipeline_json)

    def unread_options(self, options: Options) -> list[str]:
        return unread_options(options)

    def cost(self, case: Case, options: Options) -> Work:
        from .work import load_work

        return load_work(case, options.of(CommonOptions), quality=options.of(PipelineOptions).served_quality)

    def footprint(self, case: Case, options: Options) -> Footprint:
        from .footprint import pool_footprint

        return pool_footprint(case, options)

    def refuse(self, case: Case, options: Options) -> None:
        from .refusals import refuse_load

        refuse_load(case, options.of(PipelineOptions))

    def needs(self, case: Case) -> tuple[type, ...]:
        from kvsuite.engines.capabilities import AppliesPolicy, ReadsImages, ServesUnderLoad

        found: tuple[type, ...] = (ServesUnderLoad,)
        if case.policy is not None:
            found += (AppliesPolicy,)
        return found if case.workload.get("image") is None else (*found, ReadsImages)

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        from .measure import measure_load

        measure_load(case, session, run)
        return run.found

    def case_done(self, options: Options, run: Mapping[str, Any], rows: Sequence[Row]) -> None:
        from .files import write_list

        write_list(options.of(PipelineOptions).pipeline_json, run, rows)

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
        from .table import pipeline_legend, pipeline_table

        return stacked([pipeline_table(rows)], [pipeline_legend(rows)])

    def files(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, str]:
        from .files import pipeline_files

        return pipeline_files(run, rows)

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        from .figures.render import pipeline_figures

        return pipeline_figures(run, rows)
