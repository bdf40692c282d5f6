"""``python -m kvsuite bench``: run the suites that come with the package, from any folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PACKAGE = "kvsuite.benchmarks"


def add_parser(subparsers: Any) -> None:
    """Add the command to the parsers of ``python -m kvsuite``."""
    parser = subparsers.add_parser(
        "bench",
        help="run the suites of the package; what follows is pytest's",
        description=f"Run the suites of the package: pytest --pyargs {PACKAGE}, from this folder, with what follows.",
        epilog='example:\n  python -m kvsuite bench -k "compression and streaming" --kv-model=dummy:Llama-3-8B',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run pytest in this process and return its exit code."""
    import pytest

    words = arguments.pytest_arguments
    # paths are those of this folder, and nothing is written beside the installed package
    root = [] if any(word.startswith("--rootdir") for word in words) else [f"--rootdir={Path.cwd()}"]
    return int(pytest.main([*root, "-p", "no:cacheprovider", "--pyargs", PACKAGE, *words]))
