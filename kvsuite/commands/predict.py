"""``python -m kvsuite predict``: the memory of a whole design space, from a configuration alone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError
from kvsuite.foreign_text import csv_cell, visible
from kvsuite.options.numbers import MOST_TOKENS

from .arguments import number, path_argument, whole_number

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvsuite.memory_model.config import Architecture
    from kvsuite.memory_model.prediction import Predictor
    from kvsuite.memory_model.survey import Survey

    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_ENGINES = ("mlc", "nano")
_TOTALS = ("context", "batch")
_EPILOG = """\
examples:
  python -m kvsuite predict --model dummy:Llama-3-8B --quantization q4f16_1 --space full
  python -m kvsuite predict --model dummy:Llama-3-8B --quantization q0f16,q4f16_1 --space schemes --card 8GiB
  python -m kvsuite predict --model dummy:Qwen3-8B --engine nano --space "ctx=8192,32768;batch=1,16" --card 80GiB
  python -m kvsuite predict --model my-model --space full --csv predicted.csv

Nothing is loaded but a configuration. MB is MiB. A number that is not known is n/a, with the reason above the table; it is
empty in the CSV. Points that break a rule of the space are named with the rule. Exit code 4: bad input, nothing was written.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``predict`` command."""
    parser = subparsers.add_parser(
        "predict",
        help="predict the memory of every point of a design space from a model's configuration",
        description="Predict the memory of every point of a design space, whether it fits a card, and what makes it fit.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # messages of the library name the options of pytest, so they are understood here as well
    add = parser.add_argument
    add(
        "--model",
        "--kv-model",
        metavar="MODEL",
        default="smollm2",
        help="smollm2 (default), dummy:<preset>, a folder with config.json or mlc-chat-config.json, or a hub id",
    )
    add("--engine", "--kv-engine", choices=_ENGINES, default="mlc", help="whose memory (default: mlc)")
    add(
        "--quantization",
        "--kv-quantization",
        metavar="NAMES",
        help="weight formats, separated by commas (default: of MLC weights their own, else q4f16_1; with nano none)",
    )
    add(
        "--space",
        "--kv-space",
        metavar="SPACE",
        default="small",
        help='schemes, small (default), full, or axes such as "ctx=4096,8192;batch=1,4;window=off,2048;sink=0,4"',
    )
    add(
        "--card", metavar="SIZE", help="say of each point whether it fits a card of this size (24GiB), and what to turn"
    )
    add(
        "--card-share",
        metavar="SHARE",
        type=number,
        help="share of the card that the engine uses (default: 0.85 with mlc, 0.9 with nano)",
    )
    add(
        "--json-prefill-chunk",
        metavar="TOKENS",
        type=whole_number(-MOST_TOKENS, MOST_TOKENS),
        help="mlc: prefill_chunk_size of mlc-chat-config.json (default: the model's, else what gen_config would write)",
    )
    add(
        "--total-tokens",
        choices=_TOTALS,
        help="mlc: max_total_sequence_length is the context, for all sequences together (default, as the original set it), "
        "or the batch times the context",
    )
    add(
        "--dtype",
        "--kv-dtype",
        metavar="DTYPE",
        help="nano: of weights as loaded (default: bfloat16, on a CPU float32)",
    )
    add("--device", choices=("cuda", "cpu"), help="nano: kind of the device (default: cuda)")
    add("--explain", metavar="ID", help="instead of the tables, print where the memory of this point of the space goes")
    add("--csv", metavar="FILE", type=path_argument, help="write every point as a row into this file")
    parser.set_defaults(run=run)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Predict, print, export.

    Raises
    ------
    UserError
        If the model, the space, an option or the output cannot be used.
    """
    from kvsuite.console import console_text, console_width
    from kvsuite.engines.mlc.engine import MlcEngine
    from kvsuite.engines.nano.engine import NanoEngine
    from kvsuite.memory_model.config import architecture_of
    from kvsuite.memory_model.fit import parse_card
    from kvsuite.memory_model.survey import survey
    from kvsuite.memory_model.tables import survey_tables
    from kvsuite.suites.dse.parser import parse_space

    _check(arguments)
    started = time.perf_counter()
    architecture = architecture_of(arguments.model)
    predictor = _predictor(arguments, architecture)
    named = None if arguments.quantization is None else [name.strip() for name in arguments.quantization.split(",")]
    default = architecture.quantization or "q4f16_1" if arguments.engine == "mlc" else "none"
    space = parse_space(arguments.space, quantizations=named, default=[default], option="--space")
    card = None
    if arguments.card is not None:
        share = predictor.share if arguments.card_share is None else arguments.card_share
        card = parse_card(arguments.card, share)
    rules = (MlcEngine if arguments.engine == "mlc" else NanoEngine).point_rules
    judged = space.judged(architecture.trained_length, is_dummy=architecture.is_dummy, own=rules)
    found = survey(judged, predictor, card)
    shown = _explained(found, arguments.explain) if arguments.explain else survey_tables(found)
    print(console_text(shown, width=console_width(sys.stdout.isatty())), end="")
    print(f"{len(found.rows)} points in {time.perf_counter() - started:.2f} s")
    if arguments.csv is not None:
        _write(arguments.csv, found)
    return 0


def _predictor(arguments: argparse.Namespace, architecture: Architecture) -> Predictor:
    from kvsuite.engines.mlc.memory_model import MlcMemory
    from kvsuite.engines.nano.memory_model import NanoMemory

    if arguments.engine == "mlc":
        chunk = arguments.json_prefill_chunk
        if chunk is not None and chunk < 1:
            raise UserError(f"--json-prefill-chunk={chunk}: must be at least 1")
        return MlcMemory.of(architecture, chunk, per_sequence=arguments.total_tokens == "batch")
    if architecture.quantization is not None:
        raise UserError(
            f"--model={arguments.model}: MLC weights, which nano cannot load; use --engine mlc or another model"
        )
    device = arguments.device or "cuda"
    return NanoMemory(architecture, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"), device)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that nothing reads, and a file that cannot be written, before anything is printed."""
    readers = {"json_prefill_chunk": "mlc", "total_tokens": "mlc", "dtype": "nano", "device": "nano"}
    for name, engine in readers.items():
        if getattr(arguments, name) is not None and arguments.engine != engine:
            raise UserError(f"--{name.replace('_', '-')}: only --engine {engine} reads it; leave it out")
    if arguments.card_share is not None and arguments.card is None:
        raise UserError("--card-share: needs --card")
    path = arguments.csv
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--csv={path}: the folder {path.parent} does not exist; make it first")


def _explained(found: Survey, name: str) -> RenderableType:
    from kvsuite.console import stacked
    from kvsuite.memory_model.design_point import DesignPoint
    from kvsuite.memory_model.tables import LEGEND, breakdown, find_row

    row = find_row(found.rows, DesignPoint.from_id(name))
    if row is None:
        shown = ", ".join(one.entry.point.id for one in found.rows[:3])
        raise UserError(f"--explain={name}: no valid point of --space {found.space.name}; it has {shown or 'none'} ...")
    return stacked([LEGEND, *breakdown(row, found)])


def _write(path: Path, found: Survey) -> None:
    import csv
    import io

    from kvsuite.memory_model.survey import csv_header, csv_rows
    from kvsuite.store.files import write_atomic

    stream = io.StringIO()
    writer = csv.DictWriter(stream, csv_header(), lineterminator="\n")
    writer.writeheader()
    rows = csv_rows(found)
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    write_atomic(path, stream.getvalue())
    print(f"wrote {len(rows)} rows to {visible(path)}")
