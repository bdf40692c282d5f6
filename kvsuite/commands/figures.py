"""``python -m kvsuite figures``: figures from the CSVs of suites, kvsuite's and the original program's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible

from .arguments import path_argument

if TYPE_CHECKING:
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_FOLDER = "mem_plots"
_EPILOG = """\
examples:
  python -m kvsuite figures --csv kv_cache_dse_results_Llama-3-8B-Instruct-q0f16-MLC.csv
  python -m kvsuite figures --csv kv_cache_dse_*.csv --out mem_plots
  python -m kvsuite figures --csv kv_cache_dse_results_*.csv kv_cache_dse_metrics_*.csv --out figures --svg

Results and metrics CSVs are told apart by their columns. Drawn are, from results CSVs, three memory figures for each
(<tag>_mem_...png), two comparisons (kv_cache_quant_compare...png) and four of characters a second (chars_throughput_...png);
from metrics CSVs sixteen of speed (throughput_...png, latency_...png); from both what no other point beats (dse_pareto.png) and
which knob buys what (dse_knobs.png). What cannot be drawn is said in a line, the rest is drawn. The CSVs are only read. In the
output folder files of these names are replaced, each in one step. Exit code 4: bad input, nothing was written.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``figures`` command."""
    parser = subparsers.add_parser(
        "figures",
        help="draw the figures of CSVs that suites gather (the design-space ones), the original program's too",
        description="Draw the figures of CSVs that suites gather, those of a suite together: kv_cache_dse_results_*.csv and "
        "kv_cache_dse_metrics_*.csv of the design space, <dataset>_ppl_results.csv of perplexity.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--csv",
        metavar="CSV",
        type=path_argument,
        nargs="+",
        action="extend",
        required=True,
        help="files to draw, of both kinds",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=path_argument,
        help=f"write into that folder (default: {_FOLDER} beside the first CSV)",
    )
    parser.add_argument("--svg", action="store_true", help="also write every figure as .svg")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read all, draw all, then write.

    Raises
    ------
    UserError
        If a file or the output folder cannot be used; then nothing was written.
    """
    paths: list[Path] = arguments.csv
    folder: Path = arguments.out or paths[0].parent / _FOLDER
    if folder.suffix.lower() in (".png", ".svg", ".pdf", ".jpg"):
        raise UserError(f"--out={folder}: names a picture, and there are many; give a folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder}: is no folder; give another one")
    twice = [path for path in dict.fromkeys(path.resolve() for path in paths) if _count(paths, path) > 1]
    if twice:
        raise UserError(f"--csv={twice[0]}: is given more than once; each row would count twice")

    from kvsuite.store.files import write_atomic
    from kvsuite.suites.outputs import figures_of_csvs

    drawn = figures_of_csvs(paths, ("png", "svg") if arguments.svg else ("png",))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={folder}: cannot be created ({error.strerror}); give another folder") from error
    for note in drawn.notes:
        print(f"note: {visible(note)}", file=sys.stderr)
    for name, content in drawn.files.items():
        write_atomic(folder / name, content)
        print(f"wrote {visible(folder / name)}")
    print(f"{len(drawn.files)} files")
    return 0


def _count(paths: list[Path], resolved: Path) -> int:
    return sum(path.resolve() == resolved for path in paths)
