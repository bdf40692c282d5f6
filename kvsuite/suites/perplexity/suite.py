"""The perplexity suite: what a weight format costs in quality, and what it saves in memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import stacked
from kvsuite.errors import CaseSkipped
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row
from kvsuite.suites.suite import CsvFigures, Suite, Work, served_work

from .cases import dataset_name, perplexity_cases
from .options import PerplexityOptions

if TYPE_CHECKING:
    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement

# a text of which no number of tokens was asked for
_FULL_TEXT_TOKENS = 300_000

if TYPE_CHECKING:
    from rich.console import RenderableType


class PerplexitySuite(Suite):
    """Token windows of data sets, scored by several protocols in several weight formats."""

    name = "perplexity"
    has_policies = False
    headline = (
        "perplexity", "ttft_s", "tpot_s", "kv_bytes_exact", "decode_tok_s_agg", "mem_measured_peak_bytes",
    )  # fmt: skip
    bare_run_place = 2
    is_quality_alone = True
    option_group = PerplexityOptions

    def cases(self, options: Options) -> list[Case]:
        return perplexity_cases(options)

    def check(self, options: Options) -> None:
        if not {"dataset", "dataset_path"} & options.given:
            return
        from kvsuite.workloads.corpus import check_corpus

        own = options.of(PerplexityOptions)
        option = "--kv-dataset-path" if own.dataset_path else "--kv-dataset"
        split = None if own.split == "auto" else own.split
        for request in own.dataset:
            check_corpus(request, option=option, path=own.dataset_path, split=split)

    def cost(self, case: Case, options: Options) -> Work:
        workload = case.workload
        scored = int(workload["eval_tokens"] or _FULL_TEXT_TOKENS) * int(workload["num_samples"])
        overlap = int(workload["max_length"]) / max(int(workload["stride"]), 1)
        twice = 2 if case.params.get("reference") else 1
        return served_work(case, options) + Work(int(scored * max(overlap, 1.0)) * twice, 0)

    def refuse(self, case: Case, options: Options) -> None:
        if case.model.startswith("dummy:"):
            raise CaseSkipped(f"--kv-model={case.model}: random weights have no perplexity; name a real model")

    def needs(self, case: Case) -> tuple[type, ...]:
        from kvsuite.engines.capabilities import ScoresWindows

        return (ScoresWindows,)

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        from kvsuite.measure.single_request import measure_single_request

        from .quality import WindowQuality

        own = run.options.of(PerplexityOptions)
        run.texts.datasets = {dataset_name(request): request for request in own.dataset}
        run.texts.dataset_path = own.dataset_path
        quality = WindowQuality(run, session)
        measure_single_request(session, run, lambda timed: quality.score(timed=timed))
        if case.params["reference"]:
            run.applied()
            run.phase("reference")
            quality.compare()
        return run.found

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
        from .table import perplexity_legend, perplexity_table

        return stacked([perplexity_table(rows)], [perplexity_legend(rows)])

    def files(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, str]:
        from .csv_files import csv_name, csv_rows, csv_text

        results = csv_rows(run, rows)
        return {
            csv_name(dataset): csv_text([row for row in results if row["dataset"] == dataset])
            for dataset in dict.fromkeys(str(row["dataset"]) for row in results)
        }

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        from .csv_files import csv_rows
        from .figure import render_perplexity

        results = csv_rows(run, rows)
        return render_perplexity(results) if results else {}

    def draws_csv(self, name: str, header: Sequence[str]) -> bool:
        from .columns import header_fault
        from .csv_files import is_results_name

        return is_results_name(name) or header_fault(header) is None

    def csv_figures(self, paths: Sequence[Path], kinds: Sequence[str]) -> CsvFigures:
        from .figure import figures_of_files

        return figures_of_files(paths, kinds)

    def check_gathered(self, folder: Path, cases: Sequence[Case]) -> None:
        from .csv_files import check_results

        check_results(folder, {str(case.workload["dataset"]) for case in cases})

    def gather(self, folder: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
        from .csv_files import append_results, csv_rows

        return append_results(folder, csv_rows(run, rows))
