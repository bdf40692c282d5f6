"""``python -m kvsuite ab``: two revisions measured in turns on one machine, and judged together."""

from __future__ import annotations

import argparse
import itertools
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible

from .arguments import path_argument, whole_number
from .compare import BAD_INPUT, add_rules, rules_of, show

if TYPE_CHECKING:
    from kvsuite.comparison import Side

    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_INTERRUPTED = 130
_EPILOG = """\
examples:
  python -m kvsuite ab main . -- benchmarks -k "compression and streaming"
  python -m kvsuite ab v1.0 my-branch --processes 6 --fail "decode_tok_s:-3%" -- benchmarks --kv-device=cuda:0

BASE and HEAD are revisions of the repository that you are in; . is the working tree, changes and new files included. Both run
with this interpreter, in a work tree of their own that is removed afterwards, each with its own code first on the path, in
processes that take turns (ABBA), at least 2 a side and 7 rounds each. Their records stay in the output folder. Exit code 0: no
regression, 1: at least one, 2: bad input.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``ab`` command."""
    parser = subparsers.add_parser(
        "ab",
        help="measure two revisions in turns on this machine and judge them: the mode for small differences in speed",
        description="Measure two revisions in interleaved processes and judge them together.",
        usage="python -m kvsuite ab BASE HEAD [options] -- [pytest arguments]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="a revision, or . for the working tree")
    parser.add_argument("head", metavar="HEAD", help="a revision, or . for the working tree")
    parser.add_argument(
        "--processes",
        metavar="N",
        type=whole_number(1, 1000),
        default=4,
        help="processes a side, at least 2 (default: 4)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=path_argument, help="new folder for records and logs (default: reports/ab_...)"
    )
    add_rules(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, judge, print; bad input is exit code 2."""
    try:
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted: the work trees are removed, what was measured stays", file=sys.stderr)
        return _INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    from kvsuite.comparison.compare import compare
    from kvsuite.comparison.interleaved import MIN_PROCESSES, check_side, order, read_measured, run_process
    from kvsuite.comparison.revisions import checked_out
    from kvsuite.distribution.progress import Progress

    if arguments.processes < MIN_PROCESSES:
        raise UserError(
            f"--processes={arguments.processes}: one process a side cannot tell code from luck; give {MIN_PROCESSES} or more"
        )
    rules_of(arguments.fail, complete=False)  # most mistakes are found before an hour of measuring
    with checked_out(arguments.base, arguments.head) as (base, head, inside):
        folder = _new_folder(arguments.out)
        turns = order(arguments.processes)
        print(visible(f"{base.label} and {head.label} in turns: {turns}, into {folder}"))
        progress = Progress(lambda line: print(visible(line), flush=True), len(turns))
        counts = {"A": itertools.count(1), "B": itertools.count(1)}
        sides: dict[str, Side] = {}
        for turn in turns:
            revision, side = (base, "base") if turn == "A" else (head, "head")
            name = f"{side}-{next(counts[turn])}"
            progress.case(name)
            run_process(revision, inside, arguments.pytest_arguments, folder / side, folder / f"{name}.log")
            sides[side] = read_measured(folder / side, revision)
            check_side(sides[side])
            if len(sides) == 2:
                # metrics and suites of the repository's own are known now
                rules = rules_of(arguments.fail, *sides.values())
            progress.finished(revision.label)
    if arguments.json is None:
        arguments.json = folder / "comparison.json"
    return show(compare(sides["base"], sides["head"], rules), arguments)


def _new_folder(given: Path | None) -> Path:
    folder = given or Path("reports") / f"ab_{datetime.now():%Y%m%d_%H%M%S}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be made ({error.strerror}); give a new folder") from error
    return folder.resolve()
