from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvsuite import __version__
from kvsuite.__main__ import main
from kvsuite.case import Case
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.record import Record
from kvsuite.store.store import RecordStore

DERIVED = [
    "benchmark_comparison.png",
    "benchmark_comparison.svg",
    "report.html",
    "report.json",
    "results.json",
    "table.txt",
]


def started(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m kvsuite`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "kvsuite", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )


def kvsuite(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has loaded what draws."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def make_row(name: str, suite: str = "compression") -> dict:
    case = Case(
        suite=suite, engine="hf", model="tiny", name=name, device="cpu", dtype="float32",
        policy=None if name == "baseline" else "streaming_llm",
    )  # fmt: skip
    value = MetricRegistry().value
    metrics = {
        "tpot_s": value("tpot_s", [0.01, 0.012]),
        "perplexity": value("perplexity", None, reason="random weights"),
    }
    return Record(case=case, id=f"b.py::test[{case.id}]", metrics=metrics, rounds=2).to_dict()


@pytest.fixture
def folder(tmp_path):
    run = {
        "run_id": "r", "method": "streaming_llm", "model": "tiny", "started_utc": "2026-11-20T10:00:00Z",
        "command": "pytest", "options": {}, "environment": {"python": "3"}, "seed": 1,
    }  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    with RecordStore.create(folder, run) as store:
        for name in ("baseline", "streaming_32"):
            store.append(make_row(name))
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_redraws_everything_beside_the_records(folder):
    before = (folder / "records.jsonl").read_bytes()
    done = started("report", folder, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert names(folder) == sorted([*DERIVED, "records.jsonl"])
    assert "streaming_32" in done.stdout
    assert "2 records: 2 ok" in done.stdout
    assert (folder / "table.txt").read_text().startswith("Method")
    assert (folder / "records.jsonl").read_bytes() == before
    assert len(json.loads((folder / "report.json").read_text())["records"]) == 2


def test_same_files_from_jsonl_and_from_report(folder, tmp_path):
    for source, out in [("records.jsonl", "a/deep"), ("report.json", "b")]:
        path = folder / source if source == "records.jsonl" else tmp_path / "a/deep" / source
        assert kvsuite("report", path, "--out", tmp_path / out).returncode == 0
        assert names(tmp_path / out) == DERIVED
    for name in DERIVED:
        assert (tmp_path / "a/deep" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert names(folder) == ["records.jsonl"]


def test_cut_off_line_is_noted(folder):
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"schema": "kvsuite.rec')
    done = kvsuite("report", folder)
    assert done.returncode == 0
    assert done.stderr.startswith("note: ")
    assert "line 4 is cut off" in done.stderr


def damage(folder):
    path = folder / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"schema"', b'"schem', 2))


def other_report(folder):
    (folder / "report.json").write_text('{"schema": "other/1"}')


def block(folder):
    (folder / "records.jsonl").unlink()


def damage_comparison(folder):
    (folder / "comparison.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage, "line 1 is damaged"),
        (other_report, "schema is 'other/1'"),
        (block, "no records.jsonl"),
        (damage_comparison, "comparison.json: is no comparison"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(folder, spoil, message):
    spoil(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = kvsuite("report", folder)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_blocked_out_is_a_usage_error(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    done = kvsuite("report", folder, "--out", tmp_path / "file")
    assert done.returncode == 4
    assert f"--out={tmp_path / 'file'}" in done.stderr


def test_help_and_version():
    assert started("--version").stdout == f"kvsuite {__version__}\n"
    assert "report" in started("--help").stdout
    assert "examples:" in started("report", "--help").stdout
    assert started().returncode == 2


def test_drawing_needs_neither_torch_nor_pytest_nor_pyplot(folder):
    code = (
        "import sys\n"
        "from kvsuite.__main__ import main\n"
        f"assert main(['report', {str(folder)!r}]) == 0\n"
        "loaded = {'torch', 'transformers', 'pytest', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


SAMPLE = Path(__file__).parents[1] / "data" / "perplexity_original.csv"


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "wikitext2_ppl_results.csv"
    path.write_bytes(SAMPLE.read_bytes())
    return path


def test_a_perplexity_csv_is_drawn_beside_itself(results):
    done = kvsuite("report", results)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("3 rows\n")
    assert names(results.parent) == ["wikitext2_ppl_results.csv", *drawn("wikitext2")]


def drawn(dataset):
    return [f"{dataset}_ppl_vs_quant.png", f"{dataset}_ppl_vs_quant.svg"]


@pytest.mark.parametrize(("name", "begin"), [("x.png", b"\x89PNG"), ("y.svg", b"<?xml")])
def test_the_originals_call_writes_one_file(results, tmp_path, name, begin):
    picture = tmp_path / "mem_plots" / name
    done = kvsuite("report", results, "--out", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert picture.read_bytes().startswith(begin)
    assert names(picture.parent) == [name]
    assert f"wrote {picture}" in done.stdout


def test_a_csv_into_a_folder(results, tmp_path):
    assert kvsuite("report", results, "--out", tmp_path / "a/b").returncode == 0
    assert names(tmp_path / "a/b") == drawn("wikitext2")


def two_figures(path):
    from kvsuite.suites.perplexity.csv_files import COLUMNS, csv_text, read_rows

    (row, *_) = read_rows(path)
    path.write_text(csv_text([dict.fromkeys(COLUMNS) | row | {"dataset": name} for name in ("wikitext2", "pg19")]))


def no_rows(path):
    path.write_text(path.read_text().partition("\n")[0] + "\n")


def damage_csv(path):
    path.write_text(path.read_text() + "half a row\n")


def as_it_is(path):
    pass


@pytest.mark.parametrize(
    ("spoil", "out", "message"),
    [
        (two_figures, "x.png", "gives 2 figures (wikitext2_ppl_vs_quant.png, pg19_ppl_vs_quant.png); give a folder"),
        (no_rows, "x.png", "wikitext2_ppl_results.csv: no perplexity row to draw, only a header; "),
        (no_rows, "folder", "wikitext2_ppl_results.csv: no perplexity row to draw, only a header; "),
        (damage_csv, "folder", "line 5 has 1 field, 10 are needed"),
        (as_it_is, "x.pdf", ".pdf is not drawn; give a folder, a .png or a .svg"),
    ],
)
def test_a_csv_that_cannot_be_drawn_leaves_nothing(results, tmp_path, spoil, out, message):
    spoil(results)
    done = kvsuite("report", results, "--out", tmp_path / out)
    assert (done.returncode, done.stdout) == (4, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert names(tmp_path) == [results.name]


@pytest.mark.parametrize("out", ["x.png", "x.SVG", "x.pdf"])
def test_records_are_not_written_into_a_picture(folder, tmp_path, out):
    done = kvsuite("report", folder, "--out", tmp_path / out)
    assert done.returncode == 4
    assert f"--out={tmp_path / out}" in done.stderr
    assert "give a folder" in done.stderr
    assert names(tmp_path) == ["run"]
