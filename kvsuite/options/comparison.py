"""The `--kv-*` options of a comparison."""

from __future__ import annotations

from .option import Option


def _base(text: str) -> str | None:
    if not text.strip():
        raise ValueError("is empty")
    return None if text.strip() == "off" else text.strip()


def _rules(text: str) -> str | None:
    from kvsuite.comparison.rules import parse_rules

    if text.strip() == "off":
        return None
    parse_rules(text)  # whether the metrics exist is asked when those of the hooks and of the base are known
    return text.strip()


COMPARISON_OPTIONS: tuple[Option, ...] = (
    Option("compare", _base, "off", "Compare every metric with an earlier run: its folder, records.jsonl or report.json, a "
           "file of pytest-benchmark, a folder of runs, or latest, e.g. --kv-compare=latest.", example="latest"),
    Option("fail", _rules, "off", "Rules of the comparison; what breaks one fails its test, e.g. "
           '--kv-fail="peak_vram:+2%,perplexity:+0.5%,decode_tok_s:-5%,missing" or --kv-fail=default.', example="default"),
)  # fmt: skip
