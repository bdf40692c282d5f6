"""The page in a real browser: clicks, keys, and hostile texts that must do nothing."""

from __future__ import annotations

import json
import random

import pytest
from chromium import BROWSER, MISSING, Browser, chromium
from page_samples import HOSTILE, hostile_comparison, hostile_row, hostile_run, page

pytestmark = pytest.mark.skipif(BROWSER is None, reason=MISSING)

READY = "document.documentElement.dataset.ready === 'yes'"
NAMES = "#case-table tbody th"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def opened(browser: Browser, path, **window) -> Browser:
    browser.open(path, **window)
    browser.wait(READY)
    assert browser.complaints == []
    assert {url for url in browser.requests if not url.startswith("data:image/")} == {path.as_uri()}
    return browser


def headers(browser: Browser) -> list[str]:
    return [text.split("\n")[0].rstrip("▲▼") for text in browser.texts("#case-table thead th")]


def press(browser: Browser, title: str) -> None:
    browser.click("#case-table thead button", headers(browser).index(title))


def column(browser: Browser, title: str) -> list[str]:
    return browser.texts(f"#case-table tbody tr[data-row] > :nth-child({headers(browser).index(title) + 1})")


@pytest.fixture
def report(tmp_path, run, row):
    rows = [
        row("baseline", kv_bytes=7 * 2**20, tpots=(0.0109, 0.011, 0.0111), texts=((1100.0, 400, 160),)),
        row("streaming_2", budget=2, kv_bytes=2**20, tpots=(0.0209, 0.021, 0.0211), texts=((1300.0, 400, 160),)),
        row(
            "streaming_10", budget=10, kv_bytes=3 * 2**20, tpots=(0.00109, 0.0011, 0.00111), texts=((1200.0, 400, 160),)
        ),
        row("streaming_11", budget=11, kv_bytes=2**20, tpots=(0.0049, 0.005, 0.0051), kind="dummy"),
        row(
            "broken",
            status="error",
            error={"type": "RuntimeError", "message": "no luck", "traceback": "Traceback: here"},
        ),
        row("absent", status="skipped", reason="needs kvpress; run: pip install kvpress"),
    ]
    for place, found in enumerate(rows):
        found["case_index"] = place
    rows[1]["warnings"] = ["the wind blew"]
    return page(tmp_path, run, rows)


def test_sorting_by_clicks_and_keys(browser, report):
    opened(browser, report)
    order = browser.texts(NAMES)
    assert order == ["baseline", "streaming_2", "streaming_10", "streaming_11", "broken", "absent"]
    press(browser, "TPOT")
    assert browser.texts(NAMES) == ["streaming_10", "streaming_11", "baseline", "streaming_2", "broken", "absent"]
    browser.key("Enter")  # the header has the focus
    assert browser.texts(NAMES) == ["streaming_2", "baseline", "streaming_11", "streaming_10", "broken", "absent"]
    assert browser.run("document.querySelector('#case-table th[aria-sort=descending]').innerText").startswith("TPOT")
    browser.key("Enter")
    assert browser.texts(NAMES) == order
    press(browser, "Case")
    assert browser.texts(NAMES) == ["absent", "baseline", "broken", "streaming_2", "streaming_10", "streaming_11"]
    press(browser, "Status")
    assert [text.split()[-1] for text in column(browser, "Status")] == ["error", "skipped", "ok", "ok", "ok", "ok"]
    # what has no number is last whichever way round
    for _ in range(2):
        press(browser, "Perplexity")
        assert browser.texts(NAMES)[3:] == ["streaming_11", "broken", "absent"]


def test_filtering_by_typing_and_choosing(browser, report):
    opened(browser, report)
    browser.click("#case-table input[type=search]")
    browser.type("streaming 1")
    assert browser.texts(NAMES) == ["streaming_10", "streaming_11"]
    assert browser.texts("#case-table .state") == ["2 cases (of 6)"]
    browser.type(" nothing")
    assert browser.texts("#case-table tbody") == ["No cases match."]
    opened(browser, report)
    browser.choose("#case-table select[aria-label=Status]", "skipped")
    assert browser.texts(NAMES) == ["absent"]
    opened(browser, report)
    for words, found in [("luck", ["broken"]), ("WIND", ["streaming_2"]), ("pip install", ["absent"])]:
        browser.run("document.querySelector('#case-table input[type=search]').value = ''")
        browser.click("#case-table input[type=search]")
        browser.type(words)
        assert browser.texts(NAMES) == found


def test_numbers_reasons_and_failures_can_be_read(browser, report):
    opened(browser, report)
    assert column(browser, "TPOT")[:2] == ["11.000±2.3 %", "21.000±1.2 %"]
    assert column(browser, "KV cache")[:4] == ["7", "1", "3", "1"]
    assert column(browser, "Perplexity")[3] == "n/a1"
    assert browser.texts("#case-table .footnotes li") == ["random weights"]
    assert browser.texts("#case-table td.wide") == [
        "error: RuntimeError: no luck", "skipped: needs kvpress; run: pip install kvpress",
    ]  # fmt: skip
    assert column(browser, "Status") == ["✓ ok", "✓ ok", "✓ ok", "✓ ok", "✕ error", "– skipped"]


def test_a_case_opens_and_shows_everything(browser, report):
    opened(browser, report)
    browser.click(f"{NAMES} button", 4)
    assert browser.run(f"document.querySelectorAll('{NAMES} button')[4].getAttribute('aria-expanded')") == "true"
    (shown,) = browser.texts(".details")
    assert "Traceback: here" in shown
    assert "RuntimeError no luck" in shown
    assert "records[4]" in shown
    browser.key("Enter")
    assert browser.texts(".details") == []


def test_columns_are_chosen(browser, report):
    opened(browser, report)
    assert "end to end" not in [text.lower() for text in headers(browser)]
    browser.click("#case-table .chooser summary")
    label = browser.texts(".choices label").index("End to end")
    browser.click(".choices input", label)
    assert column(browser, "End to end")[0].startswith("600")
    browser.click(".choices input", browser.texts(".choices label").index("TPOT"))
    assert "TPOT" not in headers(browser)


def test_the_plot_marks_what_nothing_beats(browser, report):
    opened(browser, report)
    best = "[...document.querySelectorAll('#plot circle.best')].map((found) => Number(found.dataset.row)).sort()"
    assert browser.texts("#plot select option:checked") == ["KV cache", "TPOT", "Perplexity"]
    # no perplexity, no place in a plot of perplexities
    assert browser.run(best) == [0, 1, 2]
    assert "1 without one of the numbers" in browser.texts("#plot .state")[0]
    browser.choose("#plot label:last-child select", "none")
    assert browser.run(best) == [2, 3]
    # 7 MiB at 11 ms, and 1 MiB at 21 ms, are beaten now
    assert browser.run("document.querySelectorAll('#plot circle.beaten').length") == 2
    assert "uncertain" not in browser.texts("#plot .state")[0]
    browser.point("#plot circle[data-row='2']")
    (tip,) = browser.texts("#plot .tip")
    assert tip.startswith("streaming_10")
    assert "TPOT: 1.100 ms" in tip
    browser.click("#plot circle[data-row='2']")
    assert browser.run("document.activeElement.innerText") == "streaming_10"
    assert len(browser.texts(".details")) == 1


def test_where_nothing_is_the_best_no_empty_table_stands(browser, tmp_path, run, rows):
    for row in rows:
        for name in ("tpot_s", "decode_tok_s_req", "decode_tok_s_agg", "ttft_s"):
            if name in row["metrics"]:
                row["metrics"][name]["ci95"] = [0.0, 1e9]
    opened(browser, page(tmp_path, run, rows))
    assert "their times are too uncertain" in browser.texts("#plot .state")[0]
    assert browser.run("document.querySelector('#plot table.front').parentNode.hidden") is True


def test_the_plot_by_keys(browser, report):
    opened(browser, report)
    browser.run("document.querySelector('#plot svg').focus()")
    browser.key("ArrowRight")
    assert browser.texts("#plot .tip")[0].startswith("streaming_2")
    browser.key("ArrowRight")
    assert browser.texts("#plot .tip")[0].startswith("streaming_10")
    browser.key("Enter")
    assert browser.run("document.activeElement.innerText") == "streaming_10"


def test_a_phone_scrolls_one_way_only(browser, report):
    opened(browser, report, width=360, height=740, phone=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    browser.choose(".sorter select", "TPOT")
    assert browser.texts(NAMES)[0] == "streaming_10"
    browser.click(".sorter button")
    assert browser.texts(NAMES)[0] == "streaming_2"


def test_paper_gets_every_row_and_opens_what_is_folded(browser, tmp_path, run, row):
    rows = [row(f"case_{place}", case_index=place) for place in range(130)]
    opened(browser, page(tmp_path, run, rows))
    assert len(browser.texts(NAMES)) == 100
    browser.click(".pager button", 2)
    assert browser.texts(NAMES)[0] == "case_100"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert len(browser.texts(NAMES)) == 130
    assert browser.run("document.querySelectorAll('details.part:not([open])').length") == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert len(browser.texts(NAMES)) == 30


def test_hostile_texts_do_nothing(browser, tmp_path, run, row):
    rows = [hostile_row(text, place, row) for place, text in enumerate(HOSTILE)]
    path = page(tmp_path, hostile_run(run), rows, hostile_comparison())
    opened(browser, path, height=4000)
    for part in ("thead button", ".choices input", "select", "input[type=search]"):
        browser.run(
            f"document.querySelectorAll('{part}').forEach((found) => {{ found.click();"
            " found.dispatchEvent(new Event('change')); found.dispatchEvent(new Event('input')); })"
        )
    browser.run("document.querySelectorAll('details').forEach((found) => { found.open = true; })")
    browser.run("document.querySelectorAll('select').forEach((found) => { for (const place of [found.options.length - 1, 0]) {"
                " found.selectedIndex = place; found.dispatchEvent(new Event('change')); } })")  # fmt: skip
    for place in range(len(rows)):
        browser.run(f"document.querySelectorAll('{NAMES} button')[{place}].click()")
    browser.run("document.querySelector('#plot svg').focus()")
    browser.key("ArrowRight")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("window.hacked") is None
    assert browser.complaints == []
    assert browser.requests == [path.as_uri()]
    assert browser.run("location.href") == path.as_uri()
    foreign = "script:not(body > script), iframe, img, svg:not(.stage > svg), math, base, link, object, form, [onclick]"
    assert browser.run(f"document.querySelectorAll({json.dumps(foreign)}).length") == 0


def test_the_policy_would_stop_what_got_through(browser, report):
    opened(browser, report)
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.createElement('script').text = 'window.hacked = 1'",
        "document.createElement('img').setAttribute('onerror', 'window.hacked = 1')",
    ):
        with pytest.raises(AssertionError, match="Trusted"):
            browser.run(attempt)
    browser.run("document.createElement('img').src = 'https://example.invalid/x.png'")
    link = "Object.assign(document.createElement('a'), { textContent: 'x', href: 'javascript:window.hacked = 1' })"
    browser.run(f"document.body.append({link})")
    browser.click("body > a:last-child")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("window.hacked") is None
    assert "img-src data:" in json.dumps(browser.complaints)


@pytest.mark.slow
def test_ten_thousand_cases(browser, tmp_path, run, row):
    numbers = random.Random(7)
    one = json.dumps(row("case", texts=((1100.0, 400, 160),)))
    rows = []
    for place in range(10_000):
        made = json.loads(one)
        made["id"], made["case_index"] = f"test[{place}]", place
        made["case"]["name"] = f"case_{place}"
        for name in ("tpot_s", "kv_bytes_exact", "perplexity"):
            made["metrics"][name]["value"] *= numbers.uniform(0.5, 2)
        rows.append(made)
    opened(browser, page(tmp_path, run, rows))
    assert browser.texts("#case-table .state") == ["1–100 of 10,000 cases"]
    slowest = max(rows, key=lambda made: made["metrics"]["tpot_s"]["value"])
    press(browser, "TPOT")
    press(browser, "TPOT")
    assert browser.texts(NAMES)[0] == slowest["case"]["name"]
    assert len(browser.texts(NAMES)) == 100
    browser.click("#case-table input[type=search]")
    browser.type("case_9999")
    assert browser.texts(NAMES) == ["case_9999"]
    assert browser.run("document.querySelectorAll('#plot circle[data-row]').length") == 10_000
