from __future__ import annotations

import copy
import csv
import json
import math

import pytest
from jsonschema import Draft202012Validator

from kvsuite.errors import UserError
from kvsuite.record import schema
from kvsuite.reporting.report import assemble_report
from kvsuite.store.records_file import read_records
from kvsuite.store.validate import validate
from kvsuite.suites.outputs import write_outputs

SUITE_FILES = [
    "benchmark_comparison.png",
    "benchmark_comparison.svg",
    "report.html",
    "report.json",
    "results.json",
    "table.txt",
]


@pytest.mark.parametrize("kind", ["record", "run", "report"])
def test_schemas_are_schemas(kind):
    Draft202012Validator.check_schema(schema(kind))


def test_every_kind_of_record_is_valid(row):
    for status, extra in [
        ("ok", {}),
        ("oom", {"error": {"type": "OutOfMemoryError", "message": "20 MiB", "traceback": None}}),
        ("crashed", {}),
        ("skipped", {"reason": "no kvpress"}),
    ]:
        validate("record", row(status=status, **extra), "row")
    validate("record", row(kind="dummy"), "row")


def drop(*path):
    def change(row):
        for key in path[:-1]:
            row = row[key]
        del row[path[-1]]

    return change


def put(value, *path):
    def change(row):
        for key in path[:-1]:
            row = row[key]
        row[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (drop("case_key"), "top level"),
        (drop("case", "engine"), "case"),
        (drop("metrics", "tpot_s", "unit"), "metrics/tpot_s"),
        (drop("metrics", "mem_measured_peak_bytes", "reason"), "metrics/mem_measured_peak_bytes"),
        (put("", "metrics", "mem_measured_peak_bytes", "reason"), "metrics/mem_measured_peak_bytes/reason"),
        (put("inf", "metrics", "tpot_s", "value"), "metrics/tpot_s/value"),
        (put("bigger", "metrics", "tpot_s", "better"), "metrics/tpot_s/better"),
        (put("fast", "metrics", "tpot_s", "class"), "metrics/tpot_s/class"),
        (put(1.5, "metrics", "tpot_s", "version"), "metrics/tpot_s/version"),
        (put([1.0], "metrics", "tpot_s", "ci95"), "metrics/tpot_s/ci95"),
        (put("fine", "status"), "status"),
        (put("skipped", "status"), "reason"),
    ],
)
def test_bad_records_are_refused_with_the_place(row, run, tmp_path, change, place):
    bad = row()
    change(bad)
    with pytest.raises(UserError, match=rf"not a valid record, at {place}") as caught:
        validate("record", bad, "row")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="records/1"):
        write_outputs(tmp_path, run, [row("baseline"), bad], figures=False)
    assert not list(tmp_path.iterdir())


def test_report_counts_and_keeps_unknown_fields(run, rows, row):
    rows += [row("x", status="oom"), row("y", status="skipped", reason="because")]
    rows[0]["later"] = {"field": 1}
    report = assemble_report(run, rows)
    assert report["counts"] == {"ok": 5, "oom": 1, "error": 0, "crashed": 0, "invalid": 0, "skipped": 1}
    assert report["records"] == rows
    assert report["environment"] == run["environment"]
    assert "environment" not in report["run"]


def test_rewrite_keeps_unknown_fields_of_the_report(tmp_path, run, rows):
    path, *_ = write_outputs(tmp_path, run, rows, figures=False)
    report = json.loads(path.read_text()) | {"note": "added by hand"}
    path.write_text(json.dumps(report))
    write_outputs(tmp_path, run, rows, figures=False)
    assert json.loads(path.read_text()) == report


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ('{"schema": "kvsuite.report/2"}', "schema is 'kvsuite.report/2'"),
        ("[]", "schema is None"),
        ("not JSON", "move it away"),
        ('{"schema": "kvsuite.report/1", "run": {"run_id": "other"}}', "belongs to run 'other'"),
    ],
)
def test_a_foreign_report_is_never_overwritten(tmp_path, run, rows, old, message):
    (tmp_path / "report.json").write_text(old)
    with pytest.raises(UserError, match=message):
        write_outputs(tmp_path, run, rows)
    assert (tmp_path / "report.json").read_text() == old
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused(tmp_path, run, rows, bad):
    rows[0]["metrics"]["tpot_s"]["value"] = bad
    with pytest.raises(UserError, match="NaN or an infinity"):
        write_outputs(tmp_path, run, rows, figures=False)
    assert not list(tmp_path.iterdir())
    with_nan = json.dumps(rows[0])
    assert "NaN" in with_nan or "Infinity" in with_nan
    (tmp_path / "report.json").write_text(f'{{"schema": "kvsuite.report/1", "records": [{with_nan}]}}')
    with pytest.raises(UserError, match="is not JSON"):
        read_records(tmp_path)


def test_outputs_depend_on_the_rows_only(tmp_path, run, rows):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        before = copy.deepcopy((run, rows))
        written = write_outputs(folder, run, rows)
        assert sorted(path.name for path in written) == SUITE_FILES == sorted(path.name for path in folder.iterdir())
        assert (run, rows) == before
        run, rows, _ = read_records(folder / "report.json")
    for name in SUITE_FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_rows_of_a_suite_that_is_not_installed_have_a_table_and_a_csv_of_a_general_kind(tmp_path, run, row):
    rows = [row("a", suite="another"), row("b", suite="another", status="skipped", reason="no such card")]
    written = write_outputs(tmp_path, run, rows)
    assert [path.name for path in written] == ["report.json", "another_results.csv", "table.txt", "report.html"]
    assert {*tmp_path.iterdir()} == {*written}
    table = (tmp_path / "table.txt").read_text()
    assert "skipped: no such card" in table
    (first, second) = csv.DictReader((tmp_path / "another_results.csv").read_text().splitlines())
    assert float(first["tpot_s"]) == rows[0]["metrics"]["tpot_s"]["value"]
    assert (second["name"], second["status"], second["reason"]) == ("b", "skipped", "skipped: no such card")
