"""``python -m kvsuite merge``: join the shards of a sweep."""

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
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
examples:
  python -m kvsuite merge reports/shard1 reports/shard2 --out reports/whole
  python -m kvsuite merge host*/reports/*/records.jsonl -o whole --other-machines

The parts are only read. They must have been measured with the same code, options and kind of machine; a case that is in two of
them must have the same record in both. Exit code 4: bad input or a conflict, nothing was written.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``merge`` command."""
    parser = subparsers.add_parser(
        "merge",
        help="join the shards of a sweep into one run",
        description="Join runs that are parts of one sweep (--kv-shard) into one run with its report, table and figures.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        metavar="PART",
        type=path_argument,
        nargs="+",
        help="run folders, their records.jsonl, or report.json files",
    )
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", type=path_argument, required=True, help="a new folder for the whole run"
    )
    parser.add_argument(
        "--other-machines",
        action="store_true",
        help="take parts of machines that differ in GPU, driver, CPU or packages; their times do not compare",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read all, join, write.

    Raises
    ------
    UserError
        If a part cannot be read, parts conflict, or the folder cannot be written.
    """
    from kvsuite.distribution.merge import join, read_part, write_merged

    paths: list[Path] = arguments.paths
    resolved = Counter(path.resolve() for path in paths)
    twice = [path for path in paths if resolved[path.resolve()] > 1]
    if twice:
        raise UserError(f"{twice[0]}: is given more than once; name every part once")
    read = [read_part(path) for path in paths]
    merged = join([part for part, _ in read], other_machines=arguments.other_machines)
    folder = write_merged(merged, arguments.out)
    for note in [note for _, notes in read for note in notes] + merged.notes:
        print(f"note: {visible(note)}", file=sys.stderr)
    counts = Counter(row["status"] for _, row in merged.rows)
    told = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
    print(f"{len(merged.rows)} records of {len(paths)} parts: {told}")
    print(f"wrote {visible(folder)}")
    return 0
