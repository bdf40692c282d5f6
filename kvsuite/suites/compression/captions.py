"""The words around the compression figure: what was measured, how to read it, what is missing from it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from kvsuite.foreign_text import visible
from kvsuite.reporting.aggregate import Row, failure


def subtitle(shown: Mapping[str, Row]) -> str:
    """One line of what the cases share: model, device, dtype, protocol, lengths, rounds; several values are listed."""
    rows = list(shown.values())

    def facts(read: Callable[[Row], object]) -> str:
        return ", ".join(dict.fromkeys(visible(fact) for row in rows if (fact := read(row)) not in (None, "", [])))

    parts = [
        ("", facts(lambda row: row["model"].get("label") or row["case"]["model"])),
        ("", facts(lambda row: "random weights" if row["model"].get("kind") == "dummy" else None)),
        ("device ", facts(lambda row: row["case"]["device"])),
        ("", facts(lambda row: row["case"]["dtype"])),
        ("weights ", facts(lambda row: row["case"]["quantization"])),
        ("protocol ", facts(lambda row: row["case"]["workload"].get("protocol"))),
        ("positions ", facts(lambda row: row["case"]["policy_params"].get("positions"))),
        ("uncompressed layers ", facts(lambda row: row["case"]["policy_params"].get("skip_layers"))),
        ("prompt tokens ", facts(lambda row: row["case"]["workload"].get("prompt_tokens"))),
        ("decode tokens ", facts(lambda row: row["case"]["workload"].get("max_new_tokens"))),
        ("batch ", facts(lambda row: row["case"]["workload"].get("batch"))),
        ("rounds ", facts(lambda row: row["rounds"])),
    ]
    return "  |  ".join(prefix + text for prefix, text in parts if text)


def caption(run: Mapping[str, Any], labelled: Mapping[str, Row]) -> str:
    """What bars and whiskers are, and the cases that have no bar."""
    lines = [
        "Bars: median of the rounds where timed. Whiskers: half the 95 % interval of the mean (throughput, TPOT, "
        "TTFT), 1 standard error (perplexity), fewest and most tokens of a layer (cache). "
        f"Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}."
    ]
    failed = {name: row for name, row in labelled.items() if row["status"] != "ok"}
    if failed:
        lines.append("Not drawn:")
        lines += [
            textwrap.fill(f"{name}  {failure(row)}", 220, subsequent_indent="    ") for name, row in failed.items()
        ]
    return "\n".join(lines)
