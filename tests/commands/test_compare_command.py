"""``python -m kvsuite compare``: tables, Markdown, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvsuite.__main__ import main
from kvsuite.case import Case
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.record import Record
from kvsuite.store.store import RecordStore


def write_run(folder: Path, cases: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir()
    run = {
        "run_id": folder.name, "method": "m", "model": "m", "started_utc": "2026-11-21T10:00:00", "command": "pytest",
        "options": {}, "environment": {}, "seed": 1,
    }  # fmt: skip
    with RecordStore.create(folder, run) as store:
        for name, metrics in cases.items():
            case = Case("compression", "hf", "m", name, "cpu", "float32")
            row = Record(
                case=case, id=f"b.py::test[{case.id}]", case_key=case.key(model_revision="r", dataset_revision="d")
            )
            row.metrics = {metric: MetricRegistry().value(metric, value) for metric, value in metrics.items()}
            store.append(row.to_dict())
    return folder


BASE = {"a": {"kv_bytes_exact": 4096, "mem_measured_peak_bytes": 10**9}, "b": {"kv_bytes_exact": 4096}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base", BASE)


@pytest.fixture
def now(tmp_path: Path) -> Path:
    planted = {"a": {"kv_bytes_exact": 4096, "mem_measured_peak_bytes": 1_030_000_000}, "c": {"kv_bytes_exact": 1}}
    return write_run(tmp_path / "now", planted)


def run(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def test_a_run_against_itself(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, base) == 0
    out = capsys.readouterr().out
    assert out.endswith("2 cases compared: 3 same; 0 against the rules\n\n")
    assert "hf-b  kv_bytes_exact" in out


def test_a_regression_is_exit_code_1(base: Path, now: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, now) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "hf-a mem_measured_peak_bytes 953.7 MiB 982.3 MiB +3.0 % regression peak_vram:+2%" in lines
    assert "missing: b.py::test[hf-b]" in lines
    assert "new: b.py::test[hf-c]" in lines
    assert run(base, now, "--fail", "peak_vram:+3%") == 0
    assert run(base, now, "--fail", "peak_vram:+3%,missing") == 1
    assert run(base, now, "--fail", "default,compression/a/peak_vram:off") == 0


def test_several_runs_are_each_compared_with_the_first(
    base: Path, now: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, base, now) == 1
    out = capsys.readouterr().out
    assert out.count("base: base") == 2
    assert out.index("0 against the rules") < out.index("1 against the rules")


def test_markdown(base: Path, now: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, now, "--markdown") == 1
    out = capsys.readouterr().out
    assert out.startswith(
        "**kvsuite: 1 cases compared: 1 same, 1 regression, 1 missing, 1 new; 1 against the rules**\n"
    )
    assert (
        "| hf-a | mem\\_measured\\_peak\\_bytes | 953.7 MiB | 982.3 MiB | +3.0 % | regression | peak\\_vram:+2% |"
        in out
    )


def test_markdown_of_a_hostile_name_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = []
    for name, value in (("base", 1), ("now", 2)):
        folder = write_run(tmp_path / name, {"x": {"kv_bytes_exact": value}})
        file = folder / "records.jsonl"
        file.write_text(file.read_text().replace("b.py::test[hf-x]", "b.py::t[<img src=x onerror=alert(1)>|`*]"))
        sides.append(folder)
    assert run(*sides, "--markdown") == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "img" in line]
    assert "<" not in line
    assert "\\|\\`\\*" in line


def test_the_json_is_the_plugins(base: Path, now: Path, tmp_path: Path) -> None:
    assert run(base, now, "--json", tmp_path / "x.json") == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["base"] == {"label": "base", "run": "base"}
    assert found["counts"] == {"same": 1, "regression": 1}
    assert found["missing"] == ["b.py::test[hf-b]"]
    assert found["rows"][1] == {
        "case": "b.py::test[hf-a]", "metric": "mem_measured_peak_bytes", "unit": "bytes", "base": 1e9, "now": 1.03e9,
        "change": pytest.approx(0.03), "verdict": "regression", "rule": "peak_vram:+2%", "note": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail", "peak_vramm:+2%"], "--fail=peak_vramm:+2%: no metric peak_vramm (did you mean peak_vram?)"),
        (["--fail", ""], "--fail=: is empty"),
        (["nowhere"], "C=nowhere: cannot be read"),
        (
            ["latest", "--report-dir", "nowhere"],
            "C=latest: no run under nowhere; measure once without C, or give a path",
        ),
        (["--json", "nowhere/x.json"], "cannot write nowhere/x.json"),
    ],
)
def test_bad_input_is_exit_code_2(
    base: Path, now: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, now, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_nothing_in_common_is_bad_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, write_run(tmp_path / "other", {"z": {}})) == 2
    assert "have no case in common (1 and 2 cases)" in capsys.readouterr().err


def test_ten_thousand_cases_are_cut_to_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line, *_) = (
        (write_run(tmp_path / "one", {"a": {"kv_bytes_exact": 4096}}) / "records.jsonl").read_text().splitlines()
    )
    row = json.loads((tmp_path / "one" / "records.jsonl").read_text().splitlines()[1])
    for side, worse in (("base", set()), ("now", {17, 9_000})):
        (tmp_path / side).mkdir()
        with (tmp_path / side / "records.jsonl").open("w") as file:
            file.write(line + "\n")
            for index in range(10_000):
                row |= {"id": f"b.py::test[c{index}]", "case_key": f"sha256:{index}"}
                row["metrics"]["kv_bytes_exact"]["value"] = 4097 if index in worse else 4096
                file.write(json.dumps(row) + "\n")
    assert run(tmp_path / "base", tmp_path / "now") == 1
    out = capsys.readouterr().out
    assert "10000 cases compared: 9998 same, 2 regressions; 2 against the rules" in out
    assert "9976 more rows that matter less" in out
    assert {line.split()[0] for line in out.splitlines() if "regression " in line} == {"c17", "c9000"}


def test_comparing_needs_neither_torch_nor_pytest_nor_scipy(base: Path) -> None:
    code = (
        "import sys\n"
        "from kvsuite.__main__ import main\n"
        f"assert main(['compare', {str(base)!r}, {str(base)!r}]) == 0\n"
        "loaded = {'torch', 'pytest', 'scipy', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
