"""Which rows of perplexity CSVs share a figure, a panel and a bar: by text, setting and weight format; and the caption."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.workloads.windows import STRIDED, protocol_title

from .rows import quantization_tag

CsvRow = Mapping[str, Any]
#: the hash of a text; or, where there is none, the data set and the split that are known to be it
Text = str | tuple[str, str]

_PREFERRED = "wikitext2"
# what is known of texts without a hash (both published CSVs agree in every digit)
_SAME_TEXT = {("wikitext103", "test"): "wikitext2", ("wikitext103", "validation"): "wikitext2"}
# the text that the original program made: non-blank rows joined by two newlines
_KNOWN_TEXTS = {"c5b5caea5bd655cb221545a484f2f0f59d35092a17a66840d7b9513d0b99687d": ("wikitext2", "test")}
_TITLE_WIDTH = 52
_DIGITS = 12


@dataclass(frozen=True)
class Panel:
    """Bars that compare: one model, one text, one setting."""

    title: str
    bars: dict[str, CsvRow]


@dataclass(frozen=True)
class Chart:
    """What one figure shows."""

    dataset: str
    panels: list[Panel]
    caption: str


def build_charts(rows: Sequence[CsvRow]) -> list[Chart]:
    """Sort rows into figures, panels and bars.

    One figure holds what was measured under the name of one data set, a text a panel. Rows of two data sets with one text
    share a figure, and a panel where the settings are equal too. wikitext103's test and validation splits go with wikitext2's,
    which they are by publication, unless the hashes of both show different texts.

    Parameters
    ----------
    rows
        From ``read_rows`` or ``csv_row``, in the order in which they were measured; of the same bar the last one counts.

    Returns
    -------
    list[Chart]
        In order of first appearance, each with its own name.
    """
    groups: dict[str, list[CsvRow]] = {}
    for row, dataset in zip(rows, _figure_names(rows), strict=True):
        groups.setdefault(dataset, []).append(row)
    return [_chart(dataset, group) for dataset, group in groups.items()]


def _text(row: CsvRow) -> Text:
    if row["text_sha256"]:
        found = str(row["text_sha256"])
        return _KNOWN_TEXTS.get(found, found)
    name, split = str(row["dataset"]), str(row["split"])
    return _SAME_TEXT.get((name, split), name), split


def _figure_names(rows: Sequence[CsvRow]) -> list[str]:
    """The name of each row's figure."""
    names: dict[Text, list[str]] = {}
    hashed: dict[tuple[str, str], bool] = {}
    for row in rows:
        names.setdefault(_text(row), []).append(str(row["dataset"]))
        place = str(row["dataset"]), str(row["split"])
        hashed[place] = hashed.get(place, False) or bool(row["text_sha256"])
    found = []
    for row in rows:
        text, split = _text(row), str(row["split"])
        name = _PREFERRED if _PREFERRED in names[text] else names[text][0]
        other = _SAME_TEXT.get((name, split))
        if other is not None and (other, split) in hashed:
            # equal hashes have one name already
            shown_different = isinstance(text, str) and hashed[other, split]
            name = name if shown_different else other
        found.append(name)
    return found


def _chart(dataset: str, rows: Sequence[CsvRow]) -> Chart:
    groups: dict[tuple[Any, ...], list[CsvRow]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    titles = [_title(dataset, group) for group in groups.values()]
    panels = []
    for setting, title, group in zip(groups, titles, groups.values(), strict=True):
        alike = [other for other, its in zip(groups, titles, strict=True) if its == title]
        panels.append(Panel(_wrapped([*title, _difference(setting, alike)]), _bars(group)))
    return Chart(dataset, panels, _caption(dataset, rows, panels))


# places of `_setting` that a title shows only where two would be equal without
_REVISION, _TOKENIZER, _TEXT = 1, 2, 3


def _setting(row: CsvRow) -> tuple[Any, ...]:
    """What must be equal for two bars to compare."""
    columns = ("hf_model", "model_revision", "tokenizer_hash")
    more = ("protocol", "max_length", "stride", "num_targets", "bos")
    return (*(row[name] for name in columns), _text(row), *(row[name] for name in more))


def _difference(setting: tuple[Any, ...], alike: Sequence[tuple[Any, ...]]) -> str:
    parts = []
    for word, place in (("revision", _REVISION), ("tokenizer", _TOKENIZER), ("text", _TEXT)):
        if len({other[place] for other in alike}) > 1:
            value = setting[place]
            parts.append(f"{word} {_short(value) if value else 'not in the file'}")
    return ", ".join(parts)


def _short(value: object) -> str:
    text = " ".join(value) if isinstance(value, tuple) else str(value).removeprefix("sha256:")
    return text[:_DIGITS]


def _title(dataset: str, rows: Sequence[CsvRow]) -> tuple[str, ...]:
    row = rows[-1]
    # a row without a protocol is the original program's own, with its formula
    protocol = row["protocol"] or "hf-strided"
    name = protocol_title(protocol) + ("" if row["protocol"] else ", its own formula")
    step = f"/{row['stride']}" if protocol in STRIDED else ""
    names = list(dict.fromkeys(str(each["dataset"]) for each in rows))
    facts = (
        "" if dataset in names else " and ".join(names),
        f"{row['split']} split" if row["split"] else "",
        f"{row['num_targets']:,} scored tokens" if row["num_targets"] else "",
        f"prefix rule {row['bos']}" if row["bos"] else "",
        f"text {row['text_sha256'][:8]}" if row["text_sha256"] else "",
    )
    return str(row["hf_model"]), f"{name}, {row['max_length']}{step}", ", ".join(filter(None, facts))


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _TITLE_WIDTH))


def _bars(rows: Sequence[CsvRow]) -> dict[str, CsvRow]:
    """The last row of each key, by a label that tells them apart."""
    last: dict[tuple[str, str, str], CsvRow] = {}
    for row in rows:
        last[quantization_tag(row), str(row["dtype"] or ""), str(row["device"]).partition(":")[0]] = row
    labels = {}
    for key, row in last.items():
        others = [other for other in last if other[0] == key[0]]
        differing = [
            key[place] or "dtype not in the file"
            for place in (1, 2)
            if len({other[place] for other in others}) > 1 and key[place] != key[0]
        ]
        labels[f"{key[0]} ({', '.join(differing)})" if differing else key[0]] = row
    return labels


def _caption(dataset: str, rows: Sequence[CsvRow], panels: Sequence[Panel]) -> str:
    drawn = [row for panel in panels for row in panel.bars.values()]
    claims: dict[tuple[str, str], list[str]] = {}
    own = {_text(row) for row in rows if row["dataset"] == dataset}
    for row in rows:
        if claim := _claim(dataset, row, own):
            claims.setdefault((str(row["dataset"]), claim), []).append(str(row["split"] or ""))
    parts = []
    for (name, claim), splits in claims.items():
        listed = ", ".join(dict.fromkeys(filter(None, splits)))
        parts.append(f"{name} ({listed}): {claim}." if listed else f"{name}: {claim}.")
    if any(row["perplexity_se"] is not None for row in drawn):
        parts.append("Whiskers: 1 standard error, a lower bound since losses correlate.")
    if any(row["perplexity_se"] is None for row in drawn):
        parts.append("No whisker: no standard error in the file.")
    if len(drawn) < len(rows):
        parts.append(f"{len(rows)} rows, the last one of each case drawn.")
    if any(row["mlc_model"] for row in drawn):
        parts.append("MLC models are labels, none was run.")
    return " ".join(parts)


def _claim(dataset: str, row: CsvRow, own: set[Text]) -> str | None:
    """What may be said of a row's text beside another data set's; ``own`` are the texts under the figure's name."""
    name, text = str(row["dataset"]), _text(row)
    other = _SAME_TEXT.get((name, str(row["split"])))
    if name != dataset and text in own:
        return f"same text as {dataset}, one result"
    if other is not None and other == dataset:
        return f"published as the text of {dataset}, which the hashes here do not show; a panel of its own"
    if other is not None and isinstance(text, tuple):
        return f"same text as {other}, not a second result"
    return None
