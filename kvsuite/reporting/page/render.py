"""Render ``report.html``: the template, the styles and the scripts of the package and the data of a run in one file."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from kvsuite import __version__
from kvsuite.metrics.registry import BUILTIN
from kvsuite.record import STATUSES
from kvsuite.reporting.aggregate import Row, by_name, in_space_order
from kvsuite.reporting.table_parts import warnings_of, which
from kvsuite.store.files import utf8, write_atomic
from kvsuite.store.records_file import RECORDS_FILE

from .cases import case_data, unmeasured
from .columns import PageColumn, metric_columns
from .facts import machine_line, run_facts, text_of
from .verdicts import COMPARISON_FILE, comparison_data, lines, read_comparison, side, verdict_counts

if TYPE_CHECKING:
    from jinja2 import Template

PAGE_FILE = "report.html"
_SCRIPTS = ("table.js", "cases.js", "scale.js", "plot.js", "verdicts.js", "page.js")
_PICTURES = {".png": "image/png", ".svg": "image/svg+xml"}
_RAW = (".json", ".jsonl", ".csv", ".txt")
_MOST_WARNINGS = 20


def build_page(
    folder: Path,
    run: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    files: Mapping[str, str | bytes] | None = None,
    source: Path | None = None,
) -> bytes:
    """Render the page that will lie in ``folder``.

    Parameters
    ----------
    folder
        Where the derived files of the run go. Where the records lie there too, all its figures and raw files are the run's.
    run, rows
        The run line and its records.
    files
        Contents by name of what is written beside the page at the same time.
    source
        The run's own folder, where ``folder`` is another one: its ``comparison.json`` is read.

    Raises
    ------
    UserError
        If the comparison is damaged.
    """
    files = files or {}
    found = sorted(folder.iterdir()) if (folder / RECORDS_FILE).is_file() else []
    names = [*(path.name for path in found if _is_own(path) and path.name not in files), *files]
    pictures = {
        name: (folder / name).read_bytes() if name not in files else _bytes(files[name])
        for name in names
        if Path(name).suffix in _PICTURES
    }
    comparison = read_comparison(source or folder)
    return render_page(folder, run, rows, comparison=comparison, pictures=pictures, beside=sorted(names))


def write_page(folder: Path, run: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write ``report.html`` into the run's folder from what lies there.

    Raises
    ------
    UserError
        If the comparison is damaged or the page cannot be written.
    """
    path = folder / PAGE_FILE
    write_atomic(path, build_page(folder, run, rows))
    return path


def render_page(
    folder: Path,
    run: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    comparison: Mapping[str, Any] | None,
    pictures: Mapping[str, bytes],
    beside: Sequence[str],
) -> bytes:
    """Render the page.

    Parameters
    ----------
    folder
        Where it will lie; sidecars of records that are there become links.
    run, rows
        The run line and its records.
    comparison
        See `kvsuite.reporting.page.verdicts.read_comparison`.
    pictures
        Figures by file name, ``.png`` or ``.svg``; of two with one stem the ``.png`` is shown, which looks as drawn on
        machines without its fonts too.
    beside
        Names of the files in ``folder``; raw ones become links.

    Returns
    -------
    bytes
        UTF-8. Whatever text a record holds, it executes nothing: the template escapes, data is JSON in an inert element and
        reaches the document as text only, and the content security policy knows the package's scripts by their hashes.
    """
    from jinja2.utils import htmlsafe_json_dumps
    from markupsafe import Markup

    rows = in_space_order(rows)
    counts = Counter(row["status"] for row in rows)
    columns = metric_columns(rows)
    style, scripts = _own("report.css"), [_own(name) for name in _SCRIPTS]
    data = {"cases": case_data(folder, rows, columns), "verdicts": comparison_data(comparison) if comparison else None}
    page = page_template().render(
        title=f"{text_of(run.get('method'))}, {text_of(run.get('model'))}",
        run_id=text_of(run.get("run_id")),
        started=text_of(run.get("started_utc")),
        machine=machine_line(run, rows),
        version=__version__,
        planned=run.get("cases") if isinstance(run.get("cases"), int) else None,
        cases=len(rows),
        counts=[(status, counts[status]) for status in STATUSES if counts[status]],
        warnings=_warnings(rows),
        unmeasured=unmeasured(rows, columns),
        facts=run_facts(run, rows),
        metrics=_definitions(columns),
        pictures=_shown(pictures),
        raw=[(name, f"./{quote(os.fsencode(name))}") for name in beside if Path(name).suffix in _RAW],
        comparison=comparison and _comparison(comparison, beside),
        # own files: the only markup that is not escaped
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        data=htmlsafe_json_dumps(data, separators=(",", ":"), allow_nan=False),
        style_hashes=_hash(style),
        script_hashes=" ".join(map(_hash, scripts)),
    )
    return utf8(page)


@functools.cache
def page_template() -> Template:
    """The page's template, compiled once in a process."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvsuite.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _is_own(path: Path) -> bool:
    """Whether it is a file of the run; what a link leads to elsewhere would be shown to whoever gets the page."""
    return path.is_file() and path.resolve().is_relative_to(path.parent.resolve())


def _own(name: str) -> str:
    return resources.files("kvsuite.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _bytes(content: str | bytes) -> bytes:
    return utf8(content) if isinstance(content, str) else content


def _shown(pictures: Mapping[str, bytes]) -> list[dict[str, str]]:
    chosen = {Path(name).stem: name for name in sorted(pictures, reverse=True)}  # .svg, then .png over it
    return [
        {
            "title": stem.replace("_", " "),
            "link": f"./{quote(os.fsencode(name))}",
            "data": f"data:{_PICTURES[Path(name).suffix]};base64,{base64.b64encode(pictures[name]).decode()}",
        }
        for stem, name in sorted(chosen.items())
    ]


def _warnings(rows: Sequence[Row]) -> dict[str, Any]:
    labelled = by_name(rows, str)
    found = warnings_of(labelled)
    first = list(found.items())[:_MOST_WARNINGS]
    return {"lines": [(text, _which(names, labelled)) for text, names in first], "more": len(found) - len(first)}


def _which(names: Sequence[str], labelled: Mapping[str, Row]) -> str:
    return which(names, labelled) if len(names) <= _MOST_WARNINGS else f" ({len(names):,} cases)"


def _definitions(columns: Sequence[PageColumn]) -> list[dict[str, Any]]:
    known = {metric.name: metric for metric in BUILTIN}
    return [
        {
            "name": column.key,
            "title": column.title,
            "better": column.better,
            "unit": known[column.key].unit if column.key in known else column.unit,
            "formula": column.formula,
        }
        for column in columns
    ]


def _comparison(found: Mapping[str, Any], beside: Sequence[str]) -> dict[str, Any]:
    return {
        "base": side(found, "base"),
        "now": side(found, "now"),
        "counts": verdict_counts(found),
        "missing": lines(found, "missing"),
        "new": lines(found, "new"),
        "renamed": lines(found, "renamed"),
        "notes": lines(found, "notes"),
        "link": f"./{COMPARISON_FILE}" if COMPARISON_FILE in beside else None,
    }
