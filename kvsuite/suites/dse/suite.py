"""The design-space suite: what context, prefill chunk, batch, window and sinks of a KV cache cost and bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import stacked
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row
from kvsuite.suites.suite import CsvFigures, Suite, Work, served_work

from .cases import dse_cases, judge
from .options import DseOptions

if TYPE_CHECKING:
    from kvsuite.engines.engine import Session
    from kvsuite.measure.case_run import CaseRun
    from kvsuite.measure.measurement import Measurement
    from kvsuite.suites.footprint import Footprint

# a text of which no number of tokens was asked for
_FULL_TEXT_TOKENS = 300_000

if TYPE_CHECKING:
    from rich.console import RenderableType


class DseSuite(Suite):
    """Design points, each served with prompts that are a share of its context window."""

    name = "dse"
    has_policies = False
    headline = (
        "perplexity", "ttft_s", "tpot_s", "kv_bytes_exact", "decode_tok_s_agg", "mem_measured_peak_bytes",
    )  # fmt: skip
    bare_run_place = 3
    option_group = DseOptions

    def cases(self, options: Options) -> list[Case]:
        return dse_cases(options)

    def cost(self, case: Case, options: Options) -> Work:
        if judge(case).broken:
            return Work(0, 0)
        work = served_work(case, options)
        if case.model.startswith("dummy:"):
            # random weights have no quality to score
            return work
        workload = case.workload
        return work + Work(int(workload["eval_tokens"] or _FULL_TEXT_TOKENS) * int(workload["num_samples"]), 0)

    def footprint(self, case: Case, options: Options) -> Footprint:
        from .footprint import point_footprint

        return point_footprint(case, options)

    def refuse(self, case: Case, options: Options) -> None:
        from .measure import refuse_point

        refuse_point(case)

    def measure(self, case: Case, session: Session, run: CaseRun) -> Measurement:
        from .measure import measure_point

        measure_point(case, session, run)
        return run.found

    def table(self, run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
        from .table import dse_legend, dse_table

        return stacked([dse_table(rows)], [dse_legend(rows)])

    def files(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, str]:
        from .files import dse_files

        return dse_files(run, rows)

    def figures(self, run: Mapping[str, Any], rows: Sequence[Row]) -> Mapping[str, bytes]:
        from .figures.draw import render_dse
        from .files import dse_sheets

        return render_dse(dse_sheets(run, rows)).files

    def draws_csv(self, name: str, header: Sequence[str]) -> bool:
        from .columns import TABLES, table_of

        return name.startswith(tuple(table.prefix for table in TABLES)) or table_of(header) is not None

    def csv_figures(self, paths: Sequence[Path], kinds: Sequence[str]) -> CsvFigures:
        from .csv_files import read_sheet
        from .figures.draw import render_dse

        sheets = [read_sheet(path) for path in paths]
        rendered = render_dse(sheets, kinds)
        return CsvFigures(rendered.files, sum(len(sheet.rows) for sheet in sheets), rendered.notes)

    def check_gathered(self, folder: Path, cases: Sequence[Case]) -> None:
        from .files import check_dse

        check_dse(folder, [(case.model, case.quantization) for case in cases])

    def gather(self, folder: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
        from .files import append_dse

        return append_dse(folder, run, rows)
