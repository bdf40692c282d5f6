"""``python -m kvsuite fit-compressor``: weights for the methods mlp and mlp_residual, fitted to a model on the CPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.errors import CaseInvalid, UserError
from kvsuite.foreign_text import visible

from .arguments import number, path_argument, whole_number

if TYPE_CHECKING:
    # a private class, but the only name for what add_subparsers returns
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_METHODS = {"mlp": "specified", "mlp_residual": "residual"}
_EPILOG = """\
examples:
  python -m kvsuite fit-compressor
  python -m kvsuite fit-compressor --method mlp --factor 4 --minutes 5 --output mlp_f4.pth
  pytest benchmarks -k compression --kv-method=mlp_residual --kv-compressor-path=mlp_compressor.pth

The model answers prompts of the text greedily from its full cache; the weights are fitted so that it predicts the same from the
merged one: every layer by itself first, then all together on the KL divergence. The best weights on held-out prompts so far are
always in the file, so that an interrupted fit leaves some. Only text is fitted: prompts with images are refused with these
weights. Exit code 4: bad input, nothing was written.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the ``fit-compressor`` command."""
    parser = subparsers.add_parser(
        "fit-compressor",
        help="fit the weights of the MLP compressor to a model, on the CPU",
        description="Fit the weights of the MLP compressor (methods mlp and mlp_residual) to a model, on the CPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # messages of the library name the options of pytest, so they are understood here as well
    add = parser.add_argument
    add("--model", "--kv-model", metavar="MODEL", default="smollm2", help="as for --kv-model (default: smollm2)")
    add("--cache-dir", "--kv-cache-dir", metavar="DIR", type=path_argument, help="as for --kv-cache-dir")
    add("--method", choices=_METHODS, default="mlp_residual", help="whose weights (default: mlp_residual)")
    add("--factor", metavar="N", type=whole_number(2, 64), default=5, help="tokens that become one (default: 5)")
    add(
        "--minutes",
        metavar="MINUTES",
        type=number,
        default=10.0,
        help="minutes of processor time for all of it, loading the model aside (default: 10)",
    )
    add(
        "--text",
        metavar="TEXT",
        default="pydoc",
        help="text to learn from, as for --kv-corpus but default, which the suites measure; the last tenth is held out "
        "(default: pydoc, the language reference inside CPython)",
    )
    add(
        "--prompt-tokens",
        metavar="N",
        type=whole_number(16, 8192),
        default=320,
        help="tokens of a prompt (default: 320)",
    )
    add(
        "--answer-tokens",
        metavar="N",
        type=whole_number(2, 2048),
        default=64,
        help="tokens of an answer (default: 64)",
    )
    add("--seed", metavar="N", type=whole_number(0, 2**31), default=0, help="of weights and order (default: 0)")
    add(
        "--output",
        metavar="FILE",
        type=path_argument,
        default=Path("mlp_compressor.pth"),
        help="where the weights go, in FastCache's layout (default: mlp_compressor.pth)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit, with a line now and then on stderr, and write the weights."""
    if not 0 < arguments.minutes <= 10_000:
        raise UserError(f"--minutes={arguments.minutes:g}: must be more than 0, at most 10000")
    if arguments.prompt_tokens < 2 * arguments.factor:
        raise UserError(
            f"--prompt-tokens={arguments.prompt_tokens}: fewer than two groups of --factor={arguments.factor} are not merged; "
            "give more"
        )
    _writable(arguments.output)
    try:
        return _fit(arguments)
    except CaseInvalid as error:
        raise UserError(str(error)) from error


def _fit(arguments: argparse.Namespace) -> int:
    from kvsuite.fitting.compressor_fit import FitSettings, fit
    from kvsuite.fitting.fit_model import load_for_fitting
    from kvsuite.fitting.own_samples import OPENINGS
    from kvsuite.fitting.training_text import check_text, training_prompts

    check_text(arguments.text)
    loaded = load_for_fitting(arguments.model, arguments.prompt_tokens + arguments.answer_tokens, arguments.cache_dir)
    vocabulary = int(loaded.text_config.vocab_size)
    prompts, held_out = training_prompts(
        arguments.text, loaded.tokenizer, vocabulary, arguments.prompt_tokens, arguments.seed
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    settings = FitSettings(
        form=_METHODS[arguments.method],  # type: ignore[arg-type]
        factor=arguments.factor,
        cpu_seconds=60 * arguments.minutes,
        answer_tokens=arguments.answer_tokens,
        seed=arguments.seed,
    )
    try:
        openings = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in OPENINGS]
        found = fit(loaded, prompts, held_out, settings, say, lambda weights: weights.write(arguments.output), openings)
    except OSError as error:
        raise _unwritable(arguments.output, error) from error
    print(
        f"{visible(str(arguments.output))}: {arguments.method} at factor {arguments.factor} for {loaded.spec.title}, "
        f"{found.divergence:.3f} nats a token on {len(held_out)} held-out prompts, mean pooling {found.mean_divergence:.3f}; "
        f"step {found.best_step} of {found.steps}, {found.prompts} prompts, {found.cpu_seconds:.0f} s of processor time"
    )
    if found.divergence >= found.mean_divergence:
        say("these weights are no better than mean pooling: give more --minutes, or --text nearer to what is served")
    return 0


def _writable(path: Path) -> None:
    """Refuse a file that cannot be written before minutes are spent on it."""
    try:
        # of a link what it leads to, which may not be there
        target = path.resolve()
        new = not target.exists()
        if not (new or target.is_file()):
            raise UserError(f"--output={visible(str(path))}: is there and no regular file; give another file")
        with target.open("ab"):
            pass
        if new:
            target.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error
    except RuntimeError as error:  # of a loop of links, before Python 3.13
        raise UserError(f"--output={visible(str(path))}: is a loop of links; give another file") from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--output={visible(str(path))}: cannot be written ({error.strerror}); give another file")
