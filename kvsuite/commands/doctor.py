"""``python -m kvsuite doctor``: what works on this machine, what would mend the rest, how noisy it is; kernels built ahead."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible
from kvsuite.options.numbers import decimal

from .arguments import path_argument

if TYPE_CHECKING:
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_LONGEST = 600.0
_SECONDS = "5"
_REPORT_DIR = Path("reports")
_DTYPES = ("bfloat16", "float16")
# of the diagnosis, and of --prepare, by their names in the namespace
_DIAGNOSES = ("json", "no_self_test", "seconds", "report_dir")
_PREPARES = ("model", "device", "dtype")
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
    parser.set_defaults(typed={})
    parser.add_argument("--json", action=_Flag, help="print one JSON document instead of tables")
    test = parser.add_mutually_exclusive_group()
    test.add_argument("--no-self-test", action=_Flag, help="leave the noise of the machine out")
    test.add_argument(
        "--seconds", metavar="S", action=_Typed, help=f"length of the self-test of each device (default: {_SECONDS})"
    )
    parser.add_argument(
        "--report-dir", "--kv-report-dir", metavar="FOLDER", type=path_argument, action=_Typed,
        help=f"folder for runs that has to be writable (default: {_REPORT_DIR})",
    )  # fmt: skip
    parser.add_argument(
        "--prepare", action="store_true", help="build the kernels of engine nano for a model ahead of its runs"
    )
    add = partial(parser.add_argument, action=_Typed)
    add("--model", "--kv-model", metavar="MODEL", help="with --prepare: as for --kv-model (default: smollm2)")
    add("--device", "--kv-device", metavar="DEVICE", help="with --prepare: as for --kv-device (default: auto)")
    add("--dtype", "--kv-dtype", metavar="DTYPE", help="with --prepare: bfloat16 or float16 (default: bfloat16)")
    parser.set_defaults(run=run)


class _Typed(argparse.Action):
    """Keeps the value, and by which of its names the option was given: that name is in the errors about it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const or values)
        namespace.typed = namespace.typed | {self.dest: option_string}


class _Flag(_Typed):
    """An option without a value."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, const=True, default=False, **options)


def run(arguments: argparse.Namespace) -> int:
    """Look, print; 1 where kvsuite cannot run.

    Raises
    ------
    UserError
        If the length of the self-test is none, or an option is of the other work of this command.
    """
    if arguments.prepare:
        return _prepare(arguments)
    for name in _PREPARES:
        if name in arguments.typed:
            raise UserError(f"{_shown(arguments, name)}: says what --prepare builds for; give --prepare too")
    try:
        seconds = decimal(arguments.seconds or _SECONDS)
    except ValueError as error:
        raise UserError(f"{_shown(arguments, 'seconds')}: {error}; for example --seconds=5") from error
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
        arguments.report_dir or _REPORT_DIR,
        seconds=None if arguments.no_self_test else seconds,
        say=lambda line: print(f"{line} ...", file=sys.stderr) if sys.stderr.isatty() else None,
    )
    if arguments.json:
        print(json.dumps(diagnosis.to_dict(), indent=2, allow_nan=False))
    else:
        show(diagnosis, Console(highlight=False))
    return 1 if diagnosis.broken else 0


def _shown(arguments: argparse.Namespace, name: str) -> str:
    """An option as it was typed."""
    typed, value = arguments.typed[name], getattr(arguments, name)
    return str(typed) if value is True else f"{typed}={visible(str(value), VALUE_LIMIT)}"


def _prepare(arguments: argparse.Namespace) -> int:
    """Build kernels ahead; 1 where engine nano cannot have the model."""
    dtype = arguments.dtype or "bfloat16"
    for name in _DIAGNOSES:
        if name in arguments.typed:
            raise UserError(
                f"{_shown(arguments, name)}: is of the diagnosis; --prepare builds and prints what it built: leave it out"
            )
    if dtype not in _DTYPES:
        raise UserError(f"{_shown(arguments, 'dtype')}: kernels are built for {' and '.join(_DTYPES)} alone")
    from rich.console import Console

    from kvsuite.doctor.findings import Diagnosis
    from kvsuite.doctor.prepare import prepare
    from kvsuite.doctor.tables import show_findings

    sections = prepare(
        arguments.model or "smollm2", arguments.device or "auto", dtype, say=lambda line: print(line, file=sys.stderr)
    )
    show_findings(Diagnosis(sections), Console(highlight=False))
    return 1 if any(one.state == "missing" for found in sections.values() for one in found) else 0
