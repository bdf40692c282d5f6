"""The `--kv-*` options of a comparison."""

# no postponed annotations: an option that is written wrongly is an error where it stands

from typing import Annotated

from .option import Option, OptionGroup, off_or, path, text


class ComparisonOptions(OptionGroup, frozen=True, kw_only=True):
    """The base of a comparison, and its rules."""

    # fmt: off
    compare: Annotated[str | None, Option(
        off_or(path), "off",
        "Compare every metric with an earlier run: its folder, records.jsonl or report.json, a file of "
        "pytest-benchmark, a folder of runs, or latest, e.g. --kv-compare=latest.",
        example="latest",
    )]
    fail: Annotated[str | None, Option(
        off_or(text), "off",
        "Rules of the comparison; what breaks one fails its test, e.g. "
        '--kv-fail="peak_vram:+2%,perplexity:+0.5%,decode_tok_s:-5%,missing" or --kv-fail=default.',
        example="default",
    )]
    # fmt: on
