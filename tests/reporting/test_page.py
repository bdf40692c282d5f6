from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_samples import HOSTILE, hostile_comparison, hostile_row, hostile_run, page

from kvsuite.errors import UserError
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.reporting.page.columns import metric_columns
from kvsuite.reporting.page.facts import run_facts
from kvsuite.reporting.page.render import build_page

VALUE = MetricRegistry().value


class Parsed(HTMLParser):
    """Elements, attributes and the contents of scripts and styles, as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self._inside: str | None = None
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag
            self.raw.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[-1] = (self._inside, self.raw[-1][1] + data)
        else:
            self.text += data

    def data(self) -> dict[str, Any]:
        (text,) = [text for (tag, text) in self.raw if tag == "script" and text.startswith("{")]
        return json.loads(text)


def parsed(folder, run, rows, comparison=None) -> Parsed:
    return Parsed(page(folder, run, rows, comparison).read_text(encoding="utf-8"))


def test_the_policy_allows_the_pages_own_scripts_and_styles_alone(tmp_path, run, rows):
    found = parsed(tmp_path, run, rows)
    (policy,) = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    parts = {name: sources for name, *sources in (part.split() for part in policy.split(";"))}
    hashes = {
        kind: [
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for tag, text in found.raw
            if tag == kind and not text.startswith("{")
        ]
        for kind in ("script", "style")
    }
    assert parts["default-src"] == ["'none'"]
    assert parts["script-src"] == hashes["script"]
    assert parts["style-src"] == hashes["style"]
    assert parts["img-src"] == ["data:"]
    # it stands before anything that it has to rule
    assert [tag for tag, _ in found.elements[:4]] == ["html", "head", "meta", "meta"]


def test_nothing_is_loaded_from_elsewhere(tmp_path, run, rows):
    (tmp_path / "figure.png").write_bytes(b"\x89PNG")
    found = parsed(tmp_path, run, rows)
    for tag, attributes in found.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("./", "#", "data:image/")), (tag, target)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert [a["src"] for tag, a in found.elements if tag == "img"] == ["data:image/png;base64,iVBORw=="]


def test_hostile_texts_stay_texts(tmp_path, run, row):
    rows = [hostile_row(text, place, row) for place, text in enumerate(HOSTILE)]
    calm = parsed(tmp_path, run, rows[:0])
    found = parsed(tmp_path, hostile_run(run), rows, hostile_comparison())
    assert [text for tag, text in found.raw if not text.startswith("{")] == [
        text for tag, text in calm.raw if not text.startswith("{")
    ]
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"iframe", "img", "svg", "math", "base", "link", "object", "embed", "form"}
    assert [row["case"]["name"] for row in rows] == found.data()["cases"]["names"]
    assert all(text.replace("\x00", "\ufffd") in found.text.replace("\x00", "\ufffd") for text in HOSTILE)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_comes_back_as_it_was(tmp_path, run, row, text):
    found = parsed(tmp_path, run | {"model": text or "m"}, [hostile_row(text, 0, row)])
    assert found.data()["cases"]["names"] == [f"{text} 0"]
    assert len(found.raw) == 8  # styles, data, six scripts


def test_a_lone_surrogate_leaves_a_page(tmp_path, run, row):
    content = page(tmp_path, run | {"model": "\ud800"}, [hostile_row("\udcff", 0, row)]).read_bytes()
    assert b"\\ud800" in content
    content.decode()


def test_cells_reasons_and_spreads(tmp_path, run, rows):
    cases = parsed(tmp_path, run, rows).data()["cases"]
    columns = {column["key"]: column for column in cases["columns"]}
    assert cases["names"][0] == "baseline"
    assert columns["tpot_s"] | {"formula": ""} == {
        "key": "tpot_s", "title": "TPOT", "kind": "metric", "unit": "ms", "scale": 0.001, "decimals": 0, "better": "lower",
        "group": "speed", "formula": "", "shown": True, "timed": True,
    }  # fmt: skip
    assert cases["spread"]["tpot_s"][0] == pytest.approx(4.302653 * 0.001 / 3**0.5 / 0.011, rel=1e-3)
    assert columns["kv_bytes_exact"]["unit"] == "MiB"
    # none has a number: told above the table, offered but not shown in it
    assert not columns["mem_measured_peak_bytes"]["shown"]
    reasons = {cases["pool"][place] for place in cases["missing"]["mem_measured_peak_bytes"].values()}
    assert reasons == {"not measured on cpu"}
    assert not columns["policy"]["shown"]


@pytest.mark.parametrize(
    ("name", "values", "unit", "decimals"),
    [
        ("ttft_s", [0.5, 2.0, 4.0], "s", 4),
        ("ttft_s", [0.000021, 0.0000405], "µs", 2),
        ("perplexity", [15.8, 78.31], "", 2),
        ("perplexity", [15.8, 1234567.8], "", 2),
        ("kv_bytes_exact", [2**30, 2**31], "GiB", 0),
        ("kv_bytes_exact", [0, 0], "GiB", 0),
        ("next_token_acc", [0.4531, 0.41], "%", 2),
        ("cache_tokens_min", [32, 64], "tokens", 0),
    ],
)
def test_a_columns_unit_and_decimals(row, name, values, unit, decimals):
    rows = [row(status="ok") | {"metrics": {name: VALUE(name, value)}} for value in values]
    (column,) = metric_columns(rows)
    assert (column.unit, column.decimals) == (unit, decimals)


def test_only_files_of_the_run_are_linked(tmp_path, run, row):
    folder = tmp_path / "run"
    (folder / "tokens").mkdir(parents=True)
    (folder / "tokens" / "a b#.parquet").touch()
    (tmp_path / "outside.parquet").touch()
    (folder / "wikitext2_ppl_results.csv").touch()
    sidecars = ["tokens/a b#.parquet", "../outside.parquet", "tokens/none.parquet", str(tmp_path / "outside.parquet")]
    rows = [row(f"case_{n}", sidecar=name, case_index=n) for n, name in enumerate(sidecars)]
    found = parsed(folder, run, rows)
    assert found.data()["cases"]["links"] == [
        {"name": "tokens/a b#.parquet", "href": "./tokens/a%20b%23.parquet"}, None, None, None,
    ]  # fmt: skip
    links = [a["href"] for tag, a in found.elements if tag == "a" and a["href"].startswith("./")]
    assert links == ["./records.jsonl", "./wikitext2_ppl_results.csv"]


def test_a_folder_that_is_no_run_gives_the_page_nothing_but_what_is_written(tmp_path, run, rows):
    (tmp_path / "holiday.png").write_bytes(b"x")
    text = build_page(tmp_path, run, rows, files={"figure.svg": "<svg/>", "report.json": "{}"}).decode()
    assert "holiday" not in text
    assert "data:image/svg+xml;base64,PHN2Zy8+" in text
    assert 'href="./report.json"' in text


def test_the_worst_verdicts_come_first(tmp_path, run, rows):
    verdicts = ["same", "regression", "better", "unstable"]
    comparison = {
        "base": {"label": "0001", "run": "r0"}, "now": {"label": "now", "run": "r1"}, "missing": ["gone"], "new": [],
        "renamed": [{"base": "old name", "now": "new name"}], "notes": ["another driver: times are information"],
        "rows": [{"case": f"c{n}", "metric": "tpot_s", "unit": "s", "base": 1.0, "now": None, "change": None, "verdict": v}
                 for n, v in enumerate(verdicts)],
    }  # fmt: skip
    found = parsed(tmp_path, run, rows, comparison)
    assert found.data()["verdicts"]["verdict"] == ["regression", "unstable", "better", "same"]
    assert "0001 · r0 → now · r1" in found.text
    assert "gone" in found.text
    assert "old name → new name" in found.text
    assert "another driver: times are information" in found.text


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"rows": [1]}', '{"rows": [{"verdict": NaN}]}', '{"rows": [{"case": 1}]}']
)
def test_a_damaged_comparison_is_named(tmp_path, run, rows, content):
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(UserError, match=r"comparison\.json: .*compare again, or remove it"):
        build_page(tmp_path, run, rows)


def test_facts_of_any_environment(run):
    strange = run | {"environment": {"host": 3, "gpu": None, "packages": ["x"], "rack": {"row": 1}}, "options": None}
    facts = dict(run_facts(strange, []))
    assert ("Host", "3") in facts["Machine"]
    assert facts["Environment"] == [("rack", '{"row": 1}')]
