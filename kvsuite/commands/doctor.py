"""``python -m kvsuite doctor``: what works on this machine, what would mend the rest, how noisy it is; kernels built ahead."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.options.numbers import decimal

from .arguments import path_argument

if TYPE_CHECKING:
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_LONGEST = 600.0
_DTYPES = ("bfloat16", "float16")
_EPILOG = """\
examples:
  python -m kvsuite doctor
  python -m kvsuite doctor --no-self-test
  python -m kvsuite doctor --json > doctor.json
  python -m kvsuite doctor --prepare --kv-model Qwen/Qwen3-8B

The self-test repeats fixed work on every device of torch and says what differences of times can be told here. Exit code 0:
kvsuite can run, if with parts missing. 1: the installation is broken. 4: bad input.

--prepare looks at nothing else: for minutes it builds the kernels with which engine nano is fastest on a CUDA device, and
keeps them. Runs never build them themselves; they take what is there, and records say what that was.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="say which parts work on this machine, what would install the others, and how noisy it is",
        description="Look at devices, drivers, versions, engines, optional parts, memory, disk and the noise of the machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    test = parser.add_mutually_exclusive_group()
    test.add_argument("--no-self-test", action="store_true", help="leave the noise of the machine out")
    test.add_argument("--seconds", metavar="S", default="5", help="length of the self-test of each device (default: 5)")
    parser.add_argument(
        "--report-dir", "--kv-report-dir", metavar="FOLDER", type=path_argument, default=Path("reports"),
        help="folder for runs that has to be writable (default: reports)",
    )  # fmt: skip
    parser.add_argument(
        "--prepare", action="store_true", help="build the kernels of engine nano for a model ahead of its runs"
    )
    add = parser.add_argument
    add("--model", "--kv-model", metavar="MODEL", help="with --prepare: as for --kv-model (default: smollm2)")
    add("--device", "--kv-device", metavar="DEVICE", help="with --prepare: as for --kv-device (default: auto)")
    add("--dtype", "--kv-dtype", metavar="DTYPE", help="with --prepare: bfloat16 or float16 (default: bfloat16)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, print; 1 where kvsuite cannot run.

    Raises
    ------
    UserError
        If the length of the self-test is none.
    """
    if arguments.prepare:
        return _prepare(arguments)
    for name in ("model", "device", "dtype"):
        if (value := getattr(arguments, name)) is not None:
            raise UserError(
                f"--{name}={visible(value, VALUE_LIMIT)}: says what --prepare builds for; give --prepare too"
            )
    try:
        seconds = decimal(arguments.seconds)
    except ValueError as error:
        raise UserError(
            f"--seconds={visible(arguments.seconds, VALUE_LIMIT)}: {error}; for example --seconds=5"
        ) from error
    if not 0 < seconds <= _LONGEST:
        raise UserError(f"--seconds={seconds:g}: must be above 0 and at most {_LONGEST:g}")
    try:
        from rich.console import Console

        from kvsuite.doctor.diagnosis import diagnose
        from kvsuite.doctor.tables import show
    except ImportError as error:
        print(f"error: kvsuite cannot run: {error}; pip install .", file=sys.stderr)
        return 1
    diagnosis = diagnose(
        arguments.report_dir,
        seconds=None if arguments.no_self_test else seconds,
        say=lambda line: print(f"{line} ...", file=sys.stderr) if sys.stderr.isatty() else None,
    )
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=2, allow_nan=False))
    else:
        show(diagnosis, Console(highlight=False))
    return 1 if diagnosis.broken else 0


def _prepare(arguments: argparse.Namespace) -> int:
    """Build kernels ahead; 1 where engine nano cannot have the model."""
    dtype = arguments.dtype or "bfloat16"
    if arguments.json:
        raise UserError("--json: is of the diagnosis; --prepare builds and prints what it built")
    if dtype not in _DTYPES:
        raise UserError(f"--dtype={visible(dtype, VALUE_LIMIT)}: kernels are built for {' and '.join(_DTYPES)} alone")
    from rich.console import Console

    from kvsuite.doctor.findings import Diagnosis
    from kvsuite.doctor.prepare import prepare
    from kvsuite.doctor.tables import show_findings

    sections = prepare(
        arguments.model or "smollm2", arguments.device or "auto", dtype, say=lambda line: print(line, file=sys.stderr)
    )
    show_findings(Diagnosis(sections), Console(highlight=False))
    return 1 if any(one.state == "missing" for found in sections.values() for one in found) else 0
