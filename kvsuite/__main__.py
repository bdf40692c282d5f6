"""``python -m kvsuite``: work with the records of a run, or predict one, without pytest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from . import __version__
from .commands import ab, bench, compare, doctor, figures, fit_compressor, merge, parity, predict, report, status
from .commands.arguments import Parser
from .errors import UserError

USAGE_ERROR = 4  # pytest's exit code for the same thing
BROKEN_PIPE = 128 + 13  # what a shell reports for a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad input is one line on stderr and exit code 4."""
    parser: argparse.ArgumentParser = Parser(
        prog="python -m kvsuite", description="Work with the records of a kvsuite run, or predict memory."
    )
    parser.add_argument("--version", action="version", version=f"kvsuite {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    report.add_parser(subparsers)
    bench.add_parser(subparsers)
    figures.add_parser(subparsers)
    predict.add_parser(subparsers)
    doctor.add_parser(subparsers)
    compare.add_parser(subparsers)
    ab.add_parser(subparsers)
    merge.add_parser(subparsers)
    fit_compressor.add_parser(subparsers)
    status.add_parser(subparsers)
    parity.add_parser(subparsers)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show ± still gets its numbers
    words = list(sys.argv[1:] if argv is None else argv)
    # what follows is pytest's, wherever the command's own options stand
    end = words.index("--") if words[:1] == ["ab"] and "--" in words else len(words)
    if words[:1] == ["bench"] and words[1:2] not in (["-h"], ["--help"]):
        end = 1
    rest = words[end:]
    if rest[:1] == ["--"]:
        del rest[0]
    arguments = parser.parse_args(words[:end], argparse.Namespace(pytest_arguments=rest))
    try:
        code: int = arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        # whoever read our output wants no more of it: head, a pager; the interpreter must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


if __name__ == "__main__":
    sys.exit(main())
