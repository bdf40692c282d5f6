"""Rows, runs and comparisons for the tests of the page, honest and hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvsuite.reporting.page.render import write_page
from kvsuite.store.records_file import RECORDS_FILE

#: texts that would set ``window.hacked``, load something or break the data if any of them were taken as markup or code
HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=1</script>",
    "</ScRiPt ><svg/onload=window.hacked=1>",
    "<!--<script>window.hacked=1",
    "--><img src=x onerror=window.hacked=1>",
    "]]><img src=x onerror=window.hacked=1>",
    "</title><img src=x onerror=window.hacked=1>",
    "</textarea></style></noscript><img src=x onerror=window.hacked=1>",
    '"><img src=x onerror=window.hacked=1>',
    "' onmouseover='window.hacked=1' autofocus onfocus='window.hacked=1",
    '" style="position:fixed;inset:0" onclick="window.hacked=1" x="',
    "`${window.hacked=1}`",
    "\\u003cscript\\u003ewindow.hacked=1\\u003c/script\\u003e",
    '\\"};window.hacked=1;//',
    "a\u2028window.hacked=1\u2029b",
    "javascript:window.hacked=1",
    "data:text/html,<script>parent.window.hacked=1</script>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<base href='https://example.invalid/'><link rel=stylesheet href='https://example.invalid/x.css'>",
    "<meta http-equiv=refresh content='0;url=https://example.invalid/'>",
    "<math><mi//xlink:href='data:x,<script>window.hacked=1</script>'>",
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "&lt;img src=x onerror=window.hacked=1&gt;&#60;script&#62;",
    "\x00\x01\x1b[31m\x7f\x85",
    "\u202egnp.exe\u2066\u200b",
    "__proto__",
    "constructor",
)


def hostile_row(text: str, place: int, make: Any) -> dict[str, Any]:
    """A row that says ``text`` wherever a record holds free text; every third one failed."""
    row: dict[str, Any] = make(f"case {place}", status="error" if place % 3 == 2 else "ok", case_index=place)
    row["id"] = f"{text}[{place}]"
    row["case"] |= {"name": f"{text} {place}", "model": text, "policy": text, "quantization": text, "dtype": text}
    row["case"]["params"] |= {text: text, "group": text}
    row["case"]["workload"] |= {text: text, "protocol": text}
    row["warnings"] = [text]
    row["inert"] = {text: text}
    row["effective"] = {text: text}
    row["sidecar"] = text
    row["dataset"] = {"name": text}
    row["memory"]["measured"] = {text: text}
    for entry in row["metrics"].values():
        entry["formula"] = text
        if entry["value"] is None:
            entry["reason"] = text
    row["metrics"][text] = {
        "value": 1.5, "unit": text or "1", "better": "lower", "class": "timed", "version": 1, "formula": text or "f",
    }  # fmt: skip
    if row["status"] == "error":
        row["error"] = {"type": text, "message": text, "traceback": text, "phase": text}
    return row


def hostile_comparison() -> dict[str, Any]:
    rows = [
        dict.fromkeys(("case", "metric", "unit", "base", "now", "change", "verdict", "rule", "note"), text)
        for text in HOSTILE
    ]
    text = "".join(HOSTILE)
    lists = {name: [*HOSTILE] for name in ("missing", "new", "notes")}
    renamed = [{"base": text, "now": text} for text in HOSTILE]
    return {"base": {"label": text, "run": text}, "now": text, "rows": rows, "renamed": renamed, **lists}


def hostile_run(run: dict[str, Any]) -> dict[str, Any]:
    text = " ".join(HOSTILE)
    strange = {
        "environment": {text: text, "host": {text: text, "cpu": text}, "gpu": {text: text, "name": text},
                        "packages": {text: text}, "variables": {text: text}, "kvsuite": {"commit": text}},
        "options": {text: text}, "command": [*HOSTILE], "run_id": text, "method": text, "model": text, "started_utc": text,
    }  # fmt: skip
    return run | strange


def page(folder: Path, run: dict[str, Any], rows: list[dict[str, Any]], comparison: Any = None) -> Path:
    """The page of a run in ``folder``, drawn as at the end of a run."""
    (folder / RECORDS_FILE).touch()
    if comparison is not None:
        (folder / "comparison.json").write_text(json.dumps(comparison))
    return write_page(folder, run, rows)
