"""The files that are derived from a run's rows, by the suites whose rows they are. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.console import console_text, stacked
from kvsuite.errors import UserError
from kvsuite.options.common import CommonOptions
from kvsuite.options.option import options_in
from kvsuite.options.resolve import Options
from kvsuite.reporting.aggregate import Row, in_space_order
from kvsuite.reporting.gathered_csv import header_of
from kvsuite.reporting.machines import MEANING as MACHINES
from kvsuite.reporting.machines import has_several_machines
from kvsuite.reporting.report import assemble_report, report_bytes
from kvsuite.store.files import write_atomic
from kvsuite.store.records_file import REPORT_FILE

from .registry import in_order, suite_of_rows, usable_suites
from .suite import CsvFigures, Suite

if TYPE_CHECKING:
    from rich.console import RenderableType

TABLE_FILE = "table.txt"


def by_suite(rows: Sequence[Row]) -> Iterator[tuple[Suite, list[Row]]]:
    """Each suite that has rows, with its rows in their order."""
    for suite in in_order(suite_of_rows(name) for name in dict.fromkeys(str(row["suite"]) for row in rows)):
        yield suite, [row for row in rows if row["suite"] == suite.name]


def unread_options(suites: Sequence[Suite], options: Options) -> list[str]:
    """Options that a user set although none of these suites reads them: of one that all have, each has to say so."""
    unread = [set(suite.unread_options(options)) for suite in suites]
    shared = {f"--kv-{option.field.replace('_', '-')}" for option in options_in(CommonOptions)}
    return sorted(one for one in set().union(*unread) if one not in shared or all(one in own for own in unread))


def run_table(run: Mapping[str, Any], rows: Sequence[Row]) -> RenderableType:
    """The tables of every suite of a run, one below the other, with what their columns mean.

    A run that was to have more cases than rows (``cases`` of the run line) says so.
    """
    tables = [[table] for suite, own in by_suite(rows) if (table := suite.table(run, own)) is not None]
    cases = run.get("cases")
    partial = (
        [f"partial: {len(rows)} of {cases} cases have a record"] if cases is not None and len(rows) < cases else []
    )
    machines = [MACHINES] if has_several_machines(rows) else []
    return stacked(*tables, [*machines, *partial])


def run_figures(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, bytes]:
    """Figures of every suite of a run by file name."""
    return {name: drawn for suite, own in by_suite(rows) for name, drawn in suite.figures(run, own).items()}


def figures_of_csvs(paths: Sequence[Path], kinds: Sequence[str]) -> CsvFigures:
    """Figures of CSV files, each by the suite whose it is; those of one suite are drawn together.

    Raises
    ------
    UserError
        If one cannot be read, is no suite's, or has nothing to draw.
    """
    suites = usable_suites()
    by_suite: dict[str, list[Path]] = {}
    for path in paths:
        header = header_of(path)
        name = next((suite.name for suite in suites if suite.draws_csv(path.name, header)), None)
        if name is None:
            raise UserError(
                f"{path}: is no CSV that a suite draws, by its name or its columns ({', '.join(header[:4]) or 'none'}, ...); "
                "give a CSV of kvsuite or of the original program"
            )
        by_suite.setdefault(name, []).append(path)
    drawn = [suite.csv_figures(by_suite[suite.name], kinds) for suite in suites if suite.name in by_suite]
    return CsvFigures(
        {name: content for one in drawn for name, content in one.files.items()},
        sum(one.rows for one in drawn),
        [note for one in drawn for note in one.notes],
    )


def write_outputs(
    folder: Path, run: Mapping[str, Any], rows: Sequence[Row], *, figures: bool = True, source: Path | None = None
) -> list[Path]:
    """Write everything derived from a run: the report, and the tables, files and figures of its suites.

    Nothing is written before everything is built, so a damaged run leaves older files alone. Rows come out in the order of
    the suite's space, whatever order they ran in. ``figures=False`` leaves the drawing to the caller, and
    the page that shows the figures. ``source`` is the run's own folder where ``folder`` is another one.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UserError
        If the report is not valid, or the folder holds a ``report.json`` of another schema or another run.
    """
    # valid before anything is asked of a row
    report = assemble_report(run, rows)
    rows = report["records"] = in_space_order(report["records"])
    files: dict[str, str | bytes] = {REPORT_FILE: report_bytes(folder / REPORT_FILE, report)}
    for suite, own in by_suite(rows):
        files |= suite.files(run, own)
        if figures:
            files |= suite.figures(run, own)
    if rows:
        files[TABLE_FILE] = console_text(run_table(run, rows))
    if figures:
        from kvsuite.reporting.page.render import PAGE_FILE, build_page

        files[PAGE_FILE] = build_page(folder, run, rows, files=files, source=source)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]
