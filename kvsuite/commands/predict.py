"""``python -m kvsuite predict``: the memory of a whole design space, from a configuration alone."""

from __future__ import annotations

import argparse
import contextlib
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

    from kvsuite.engines.engine import Engine
    from kvsuite.memory_model.config import Architecture
    from kvsuite.memory_model.prediction import Predictor
    from kvsuite.memory_model.survey import Survey

    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

#: options that not every engine's formulas read
_SOME_READ = ("json_prefill_chunk", "total_tokens", "dtype", "device")
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
    add(
        "--engine",
        "--kv-engine",
        metavar="ENGINE",
        help="whose memory: mlc (default), nano, or another that has formulas",
    )
    add(
        "--quantization",
        "--kv-quantization",
        metavar="NAMES",
        help="weight formats, separated by commas (default: of MLC weights their own, else q4f16_1; with nano none)",
    )
    add(
        "--cache-dtype",
        "--kv-cache-dtype",
        metavar="NAMES",
        help="also say what a token's keys and values take in these cache formats (auto,int8,int8:int4), and with --card how "
        "many tokens it holds beside the weights",
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
    from kvsuite.memory_model.config import architecture_of
    from kvsuite.memory_model.fit import parse_card
    from kvsuite.memory_model.space_text import parse_space
    from kvsuite.memory_model.survey import survey
    from kvsuite.memory_model.tables import survey_tables
    from kvsuite.quantization.registry import NONE

    engine = _engine(arguments.engine)
    _check(engine, arguments)
    started = time.perf_counter()
    architecture = architecture_of(arguments.model)
    predictor = _predictor(engine, arguments, architecture)
    named = None if arguments.quantization is None else [name.strip() for name in arguments.quantization.split(",")]
    usual = engine.default_formats(arguments.model) or (NONE,)
    default = usual if architecture.quantization is None else [architecture.quantization]
    space = parse_space(arguments.space, quantizations=named, default=default, option="--space")
    card = None
    if arguments.card is not None:
        share = predictor.share if arguments.card_share is None else arguments.card_share
        card = parse_card(arguments.card, share)
    judged = space.judged(architecture.trained_length, is_dummy=architecture.is_dummy, own=engine.point_rules)
    found = survey(judged, predictor, card)
    shown = _explained(found, arguments.explain) if arguments.explain else survey_tables(found)
    print(console_text(shown, width=console_width(sys.stdout.isatty())), end="")
    if arguments.cache_dtype is not None:
        rooms = _rooms(arguments, engine, found)
        print(console_text(rooms, width=console_width(sys.stdout.isatty())), end="")
    print(f"{len(found.rows)} points in {time.perf_counter() - started:.2f} s")
    if arguments.csv is not None:
        _write(arguments.csv, found)
    return 0


def _engine(name: str | None) -> Engine:
    """The engine that was named, else the first that has formulas of its own."""
    from kvsuite.engines.registry import engine_names, get_engine

    if name is not None:
        return get_engine(name)
    return next(engine for one in engine_names() if (engine := get_engine(one)).predictor_options)


def _predictor(engine: Engine, arguments: argparse.Namespace, architecture: Architecture) -> Predictor:
    names = {"model", *engine.predictor_options}
    found = engine.predictor(architecture, {name: getattr(arguments, name) for name in names})
    if found is None:
        raise UserError(f"--engine={engine.name}: has no formulas of its memory; use {', '.join(_readers())}")
    return found


def _readers() -> dict[str, frozenset[str]]:
    """Options that only some engines' formulas read, by engine; for messages."""
    from kvsuite.engines.registry import engine_names, get_engine

    found = {}
    for name in engine_names():
        with contextlib.suppress(UserError):  # one that cannot be used reads nothing
            found[name] = get_engine(name).predictor_options
    return {name: options for name, options in found.items() if options}


def _check(engine: Engine, arguments: argparse.Namespace) -> None:
    """Refuse options that nothing reads, and a file that cannot be written, before anything is printed."""
    for name in _SOME_READ:
        if getattr(arguments, name) is not None and name not in engine.predictor_options:
            readers = " or ".join(reader for reader, options in _readers().items() if name in options)
            raise UserError(f"--{name.replace('_', '-')}: only --engine {readers} reads it; leave it out")
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


def _rooms(arguments: argparse.Namespace, engine: Engine, found: Survey) -> RenderableType:
    """What cache formats take of the model's tokens, beside weights in the first weight format of the space."""
    from kvsuite.cache_formats.chosen_format import HqqFormat, parse_format
    from kvsuite.memory_model.cache_room import StoresWindows, cache_rooms
    from kvsuite.memory_model.formats import ELEMENT_BYTES
    from kvsuite.memory_model.tables import cache_room_table
    from kvsuite.options.option import outside_brackets

    formats, notes = [], []
    for one in outside_brackets(arguments.cache_dtype):
        chosen = parse_format(one)
        if isinstance(chosen, HqqFormat):
            raise UserError(f"--cache-dtype={one}: transformers decides what its packed cache takes; use int4 or int8")
        formats.append(chosen)
        if chosen is None or arguments.engine is None:
            continue
        if reason := engine.refused_cache(arguments.model, str(chosen)):
            notes.append(reason)
    if not found.rows:
        raise UserError("--cache-dtype: no point of the space is valid, so there is no weight format to predict with")
    prediction = found.rows[0].prediction
    allocation, weights = prediction.allocation, prediction.part("parameters")
    element_bytes = 2 if allocation is None else ELEMENT_BYTES[allocation.dtype]
    free = None if found.card is None or weights is None else found.card.usable - weights
    windows = found.predictor if isinstance(found.predictor, StoresWindows) else None
    rooms = cache_rooms(found.predictor.architecture, element_bytes, formats, free, windows)
    return cache_room_table(rooms, prediction.point.quantization, element_bytes, free, notes)


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
