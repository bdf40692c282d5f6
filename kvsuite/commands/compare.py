"""``python -m kvsuite compare``: two or more runs, metric by metric, outside pytest."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError

from .arguments import path_argument

if TYPE_CHECKING:
    from kvsuite.comparison import Comparison, Rules, Side

    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

REGRESSION, BAD_INPUT = 1, 2
_EPILOG = """\
examples:
  python -m kvsuite compare reports/main_run reports/my_run
  python -m kvsuite compare .benchmarks/Linux-CPython-3.11-64bit/0001_main.json latest --markdown
  python -m kvsuite compare base.json now.json --fail "peak_vram:+2%,perplexity:+0.5%,decode_tok_s:-5%,missing"
  python -m kvsuite compare nightly/ now --fail "default,compression/streaming_*/ttft:off"

A, B, C ...: a run's folder, its records.jsonl or report.json, a file of pytest-benchmark, latest, or a folder of runs of the
same code, which are one side. A is the base; each of the others is compared with it. Exit code 0: no regression, 1: at least
one, 2: bad input. docs/comparison.md says how verdicts come about.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``compare`` command."""
    parser = subparsers.add_parser(
        "compare",
        help="compare runs metric by metric: what became better or worse, what is noise, which rule is broken",
        description="Compare runs metric by metric; regressions give exit code 1.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="A", help="the base")
    parser.add_argument("runs", metavar="B", nargs="+", help="what is compared with it")
    add_rules(parser)
    parser.add_argument(
        "--report-dir", metavar="DIR", type=path_argument, default=Path("reports"), help="where latest looks"
    )
    parser.set_defaults(run=run)


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Options that ``compare`` and ``ab`` share."""
    parser.add_argument(
        "--fail",
        metavar="RULES",
        default="default",
        help="rules as in --kv-fail (default: those of docs/comparison.md, which the word default stands for)",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown for a pull request")
    parser.add_argument("--all", action="store_true", help="print every row, also those without a change")
    parser.add_argument("--json", metavar="FILE", type=path_argument, help="also write the comparison into this file")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; bad input is one line on stderr and exit code 2."""
    try:
        return _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    from kvsuite.comparison import compare, read_side

    if arguments.json is not None and len(arguments.runs) > 1:
        raise UserError(f"--json={arguments.json}: holds one comparison; give one run beside the base")
    # a report of 10,000 cases is a million objects that all live until the end
    gc.disable()
    sides = [
        read_side(given, option=option, report_dir=arguments.report_dir)
        for option, given in zip(
            "ABCDEFGHIJ" + "Z" * len(arguments.runs), [arguments.base, *arguments.runs], strict=False
        )
    ]
    rules = rules_of(arguments.fail, *sides)
    results = [compare(sides[0], side, rules) for side in sides[1:]]
    code = 0
    for result in results:
        code = max(code, show(result, arguments))
    return code


def rules_of(text: str, *sides: Side, complete: bool = True) -> Rules:
    """Rules of ``--fail``, checked against what the sides hold; ``complete`` as in `Rules.check`.

    Raises
    ------
    UserError
        Naming the rule and the mend.
    """
    from kvsuite.comparison import known_metrics, parse_rules
    from kvsuite.suites.registry import suite_names

    known = known_metrics(*sides)
    try:
        rules = parse_rules(text, known)
    except ValueError as error:
        raise UserError(f"--fail={text}: {error}") from error
    suites = {row.suite for side in sides for run in side.runs for row in run.rows} | set(suite_names())
    rules.check(known, suites, "--fail", complete=complete)
    return rules


def show(result: Comparison, arguments: argparse.Namespace) -> int:
    """Print one comparison, write it where asked, and return its exit code.

    Raises
    ------
    UserError
        If the sides have no case in common: nothing was compared, so nothing can have passed.
    """
    from kvsuite.comparison.tables import comparison_markdown, comparison_text
    from kvsuite.console import console_width
    from kvsuite.store.files import write_atomic

    if not result.compared:
        raise UserError(
            f"{result.now.label} and {result.base.label} have no case in common ({len(result.new)} and "
            f"{len(result.missing)} cases); another model, dtype, device kind or workload is another case"
        )
    if arguments.markdown:
        print(comparison_markdown(result, everything=arguments.all))
    else:
        shown = sys.stdout.isatty()
        print(comparison_text(result, width=console_width(shown), color=shown, everything=arguments.all))
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    return REGRESSION if result.failures else 0
