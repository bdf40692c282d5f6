"""Sides, read from whatever holds records: the same numbers come out, and damage is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_samples import HOST, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsuite.__main__ import main
from kvsuite.comparison import compare, latest_run, parse_rules, read_side
from kvsuite.comparison.records import row_of
from kvsuite.errors import UserError
from kvsuite.record import REPORT_SCHEMA
from kvsuite.reporting.report import assemble_report
from kvsuite.store.files import utf8
from kvsuite.store.records_file import read_records
from kvsuite.store.store import RecordStore

METRICS = {"kv_bytes_exact": 4096, "ttft_s": [0.1, 0.11, 0.1, 0.12, 0.1]}


def write_run(folder: Path, *rows: dict[str, Any], started: str = "2026-11-21T10:00:00") -> Path:
    """A run folder, written by the real store."""
    folder.mkdir(parents=True)
    run = {
        "run_id": folder.name, "method": "m", "model": "m", "started_utc": started, "command": "pytest", "options": {},
        "environment": {"host": HOST, "gpu": {}}, "seed": 1,
    }  # fmt: skip
    with RecordStore.create(folder, run) as store:
        for row in rows or (record("a", METRICS), record("b", METRICS)):
            store.append(row)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "reports" / "run_1")


def as_report(run: Path) -> dict[str, Any]:
    facts, rows, _ = read_records(run)
    return assemble_report(facts, rows)


def test_every_form_of_a_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    report = as_report(run)
    (tmp_path / "report.json").write_text(json.dumps(report))
    facts, rows, _ = read_records(run)
    saved = {"benchmarks": [], "kvsuite": {"schema": REPORT_SCHEMA, "run": facts, "records": rows}}
    (tmp_path / "0001_x.json").write_text(json.dumps(saved))
    forms = [run, run / "records.jsonl", tmp_path / "report.json", tmp_path / "0001_x.json"]
    sides = [read_side(str(path), option="A") for path in forms]
    for side in sides:
        assert side.runs[0].rows == sides[0].runs[0].rows
        assert side.runs[0].facts.environment == {"host": HOST, "gpu": {}}
        assert compare(sides[0], side, parse_rules("default")).failures == []
    assert [side.label for side in sides] == ["run_1", "run_1", tmp_path.name, "0001_x"]


def test_a_folder_of_runs_is_one_side(run: Path) -> None:
    write_run(run.parent / "run_2")
    side = read_side(str(run.parent), option="A")
    assert [one.facts.run_id for one in side.runs] == ["run_1", "run_2"]
    assert side.run_id == "run_1, run_2"


def test_latest_is_the_newest_that_has_a_case(run: Path) -> None:
    reports = run.parent
    write_run(reports / "a_newer", record("c", METRICS), started="2026-11-22T10:00:00")
    (reports / "ab_empty").mkdir()
    assert latest_run(reports, option="A").label == "a_newer"
    # a resumed run goes on in its own folder
    assert latest_run(reports, option="A", but=reports / "a_newer").label == "run_1"
    (row, _) = read_side(str(run), option="A").runs[0].rows
    assert latest_run(reports, option="A", brackets=frozenset([row.bracket])).label == "run_1"
    assert read_side("latest", option="A", report_dir=reports).label == "a_newer"
    with pytest.raises(UserError, match=r"^--kv-compare=latest: no run under .* that has a case of this one; "):
        latest_run(reports, option="--kv-compare", brackets=frozenset(["x"]))


def test_a_line_that_was_cut_off_is_left_out_with_a_note(run: Path) -> None:
    with (run / "records.jsonl").open("ab") as file:
        file.write(b'{"schema": "kvsuite.rec')
    side = read_side(str(run), option="A")
    assert len(side.runs[0].rows) == 2
    assert "the last line is cut off" in side.notes[0]


def test_the_last_of_two_rows_with_one_id_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", record("a", METRICS), record("b", METRICS), record("a", {"kv_bytes_exact": 1}))
    rows = read_side(str(folder), option="A").runs[0].rows
    assert [(row.name, row.metrics["kv_bytes_exact"].value) for row in rows] == [("a", 1), ("b", 4096)]


def test_further_processes_of_a_run_are_part_of_its_machine(run: Path) -> None:
    lines = (run / "records.jsonl").read_text().splitlines()
    other = json.loads(lines[0])
    other["environment"]["gpu"] = {"name": "H200"}
    (run / "records.jsonl").write_text("\n".join([*lines, json.dumps(other), ""]))
    side = read_side(str(run), option="A")
    assert len(side.runs[0].rows) == 2
    assert compare(side, side, parse_rules("default")).notes[0].startswith("another machine")


def test_token_losses_come_from_the_sidecar(tmp_path: Path) -> None:
    columns = {"text": [0, 0], "position": [1, 2], "token": [5, 6], "nll": [1.0, 2.0], "correct": [True, False]}
    folder = tmp_path / "run"
    row = record("a", METRICS)
    write_run(folder)
    with RecordStore.reopen(folder) as store:
        row["sidecar"] = store.write_sidecar(row["id"], columns)
    report = as_report(folder) | {"records": [row]}
    (folder / "report.json").write_text(json.dumps(report))
    (one,) = read_side(str(folder / "report.json"), option="A").runs
    found = one.tokens(one.rows[0])
    assert found is not None
    assert (found.nll.tolist(), found.correct.tolist()) == ([1.0, 2.0], [1.0, 0.0])
    (folder / row["sidecar"]).write_bytes(b"no parquet")
    assert one.tokens(one.rows[0]) is None
    for elsewhere in ("../../etc/passwd", "/etc/passwd", "tokens/none.parquet", "a\0b"):
        report["records"][0]["sidecar"] = elsewhere
        (folder / "report.json").write_text(json.dumps(report))
        (one,) = read_side(str(folder / "report.json"), option="A").runs
        assert one.tokens(one.rows[0]) is None


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_value_that_is_no_number_is_lost(run: Path, tmp_path: Path, literal: str) -> None:
    path = tmp_path / "now.json"
    path.write_text(json.dumps(as_report(run)).replace('"value": 4096', f'"value": {literal}'))
    result = compare(read_side(str(run), option="A"), read_side(str(path), option="B"), parse_rules("default"))
    words = [(row.verdict, row.now) for row in result.rows if row.metric == "kv_bytes_exact"]
    assert words == [("regression", None), ("regression", None)]


BAD = {
    "no path": (None, "cannot be read (No such file or directory); give a run's folder"),
    "empty": ("", "is empty"),
    "no JSON": ("hello", "not a run of kvsuite"),
    "no object": ("[1]", "not a run of kvsuite"),
    "other JSON": ('{"a": 1}', "schema is None, this kvsuite reads 'kvsuite.report/1'"),
    "next version": ('{"schema": "kvsuite.report/2"}', "schema is 'kvsuite.report/2'"),
    "half a report": ('{"schema": "kvsuite.report/1", "run": {}}', "not a run of kvsuite"),
    "times alone": ('{"benchmarks": [1]}', "a file of pytest-benchmark without records of kvsuite"),
    "deep": ("[" * 100_000, "not a run of kvsuite"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_no_run_is_one_line(
    run: Path, tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("x.jsonl" if text == "" else "x.json")
    if text is not None:
        path.write_text(text)
    assert main(["compare", str(run), str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: B={path}: ")
    assert message in err
    assert err.count("\n") == 1


# anything in place of anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a document."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path] + [place for key, item in inner for place in places(item, (*path, key))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_any_damage_is_judged_or_told_and_never_a_traceback(
    run: Path, data: st.DataObject, capsys: pytest.CaptureFixture[str]
) -> None:
    report = as_report(run)
    *parents, last = data.draw(st.sampled_from(places(report)[1:]))
    inside = report
    for key in parents:
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[last] = data.draw(JSON)
    elif isinstance(inside, dict):
        del inside[last]
    path = run.parent.parent / "damaged.json"
    path.write_text(json.dumps(report))
    rules = data.draw(
        st.sampled_from(["default", "*:1%,missing,new,unstable", "compression/*/ttft:+0.5us", "kv_*:off"])
    )
    sides = [str(run), str(path)]
    code = main(["compare", *data.draw(st.permutations(sides)), "--fail", rules])
    out, err = capsys.readouterr()
    assert code in (0, 1, 2)
    assert (code == 2) == err.startswith("error: ")
    assert bool(out) == (code != 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_any_tail_of_the_jsonl_is_left_out_or_told(run: Path, data: st.DataObject) -> None:
    whole = (run / "records.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    tail = data.draw(st.binary(max_size=20))
    path = run.parent.parent / "cut.jsonl"
    path.write_bytes(whole[:cut] + tail)
    rows: tuple[Any, ...] = ()
    try:
        rows = read_side(str(path), option="A").runs[0].rows
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert len(rows) <= 2


@pytest.mark.parametrize("as_file", [True, False], ids=["a report", "this process"])
def test_names_that_are_not_utf8_are_compared(tmp_path: Path, as_file: bool) -> None:
    """Python holds such a name with half of a surrogate pair, which msgspec refuses."""
    one = record("a", METRICS)
    one["case"]["model"] = one["reason"] = "caf\udce9 \\udce9 🙂"
    if as_file:
        path = tmp_path / "records.jsonl"
        write_run(tmp_path / "run")
        lines = (tmp_path / "run" / "records.jsonl").read_bytes().split(b"\n")
        path.write_bytes(lines[0] + b"\n" + utf8(json.dumps(one, ensure_ascii=False)) + b"\n")
        ((row,),) = [run.rows for run in read_side(str(path), option="A").runs]
    else:
        row = row_of(one)
    assert row.reason == row.case["model"] == "caf\\udce9 \\udce9 🙂"
