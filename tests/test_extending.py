"""What somebody else's package adds: an engine, a suite, a policy and a metric, and no file of kvsuite touched for them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import Run, run_pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "data" / "neighbours"
RUN = ("--kv-model=dummy:tiny", "--kv-device=cpu", "--kv-threads=1", "--kv-rounds=2", "--kv-num-warmup=1",
       "--kv-max-new-tokens=6", "--kv-prompt-tokens=40")  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed beside kvsuite into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(PACKAGE, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
               "--disable-pip-version-check", "--target", str(folder / "site"), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("setuptools is not installed here: pip install 'setuptools>=77'")
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> Run:
    return run_pytest(folder, *arguments, PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]), COLUMNS="160")


def rows(folder: Path, suite: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("reports/*/records.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        # cases run in an order that is drawn; their space has one
        found += sorted((line for line in lines if line.get("suite") == suite), key=lambda line: line["case_index"])
    return found


@pytest.fixture(scope="module")
def measured(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence[str]]:
    """A run of their suite on nano and on their engine, then one of ours with their policy and engine."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(PACKAGE / "test_burst.py", folder)
    shutil.copy(ROOT / "benchmarks" / "test_compression.py", folder)
    said = []
    for arguments in (
        ("test_burst.py", "--kv-burst-sizes=1,3"),
        ("test_burst.py", "--kv-burst-sizes=1,3", "--kv-engine=plain"),
        ("test_burst.py", "--kv-burst-sizes=1,3", "--kv-engine=plain", "--kv-compare=latest"),
        ("test_compression.py", "--kv-method=dilated(stride=[2,8],recent=8)"),
        ("test_compression.py", "--kv-engine=plain", "--kv-method=dilated"),
    ):
        done = run(site, folder, *RUN, *arguments)
        assert done.code == 0, done.out + done.err
        said.append(done.out)
    return folder, said


def test_their_suite_runs_on_our_engine_and_ours_on_theirs(measured: tuple[Path, Sequence[str]]) -> None:
    folder, _ = measured
    burst = rows(folder, "burst")
    assert [(row["case"]["engine"], row["case"]["name"], row["status"]) for row in burst] == [
        (engine, name, "ok") for engine in ("nano", "plain", "plain") for name in ("burst01", "burst03")
    ]
    spreads = {row["case"]["name"]: row["metrics"]["ttft_spread_s"]["value"] for row in burst[2:4]}
    # one request has no spread; of three in turn the last waits for the others
    assert spreads["burst01"] == 0 < spreads["burst03"]
    assert burst[2]["effective"]["device"] == "cpu"


def test_what_their_engine_lacks_is_a_reason_and_never_a_number(measured: tuple[Path, Sequence[str]]) -> None:
    folder, _ = measured
    found = {row["case"]["name"]: row for row in rows(folder, "compression") if row["case"]["engine"] == "plain"}
    assert found["baseline"]["status"] == "ok"
    assert found["baseline"]["metrics"]["perplexity"]["value"] is None
    assert found["baseline"]["metrics"]["perplexity"]["reason"]
    assert found["baseline"]["metrics"]["ttft_s"]["value"] > 0
    [policy] = [row for name, row in found.items() if name != "baseline"]
    assert policy["status"] == "invalid"
    assert "engine plain keeps the whole cache" in policy["reason"]


def test_their_policy_is_swept_by_both_parameters(measured: tuple[Path, Sequence[str]]) -> None:
    folder, _ = measured
    found = [
        row
        for row in rows(folder, "compression")
        if row["case"]["policy"] == "dilated" and row["case"]["engine"] == "hf"
    ]
    assert [(row["case"]["policy_params"]["stride"], row["case"]["policy_params"]["recent"]) for row in found] == [
        (2, 8),
        (8, 8),
    ]
    assert all(row["status"] == "ok" for row in found)
    # 40 tokens of prompt and 5 fed: 8 recent ones, and every second or eighth of the older
    assert found[0]["metrics"]["cache_tokens_max"]["value"] > found[1]["metrics"]["cache_tokens_max"]["value"]


def test_all_of_it_stands_in_table_page_csv_and_comparison(measured: tuple[Path, Sequence[str]]) -> None:
    folder, said = measured
    assert re.search(r"TTFT spread", said[1])
    assert re.search(r"burst03 .*\d", said[1])
    assert "2 cases compared: " in said[2]
    assert re.search(r"plain-burst03 +ttft_spread_s", said[2])
    newest = sorted(folder.glob("reports/burst_*"))[-1]
    page = next(newest.glob("*.html")).read_text(encoding="utf-8")
    assert "ttft_spread_s" in page
    assert "TTFT spread" in page
    with next(newest.glob("*.csv")).open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [row["name"] for row in table] == ["burst01", "burst03"]
    assert float(table[1]["ttft_spread_s"]) > 0
    comparison = json.loads((newest / "comparison.json").read_text())
    assert "ttft_spread_s" in json.dumps(comparison)


def test_an_edit_of_their_code_is_another_measurement(
    site: Path, measured: tuple[Path, Sequence[str]], tmp_path: Path
) -> None:
    folder, _ = measured
    run_folder = sorted(folder.glob("reports/burst_*"))[0]
    code = json.loads((run_folder / "records.jsonl").read_text().splitlines()[0])["code"]
    assert set(code) == {"kvsuite", "neighbours", "test_burst.py"}
    shutil.copytree(run_folder, tmp_path / "reports" / run_folder.name)
    shutil.copy(PACKAGE / "test_burst.py", tmp_path)
    records = tmp_path / "reports" / run_folder.name / "records.jsonl"
    # one of its two cases is left to do
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:2]))
    edited = tmp_path / "site"
    shutil.copytree(site, edited)
    suite = edited / "neighbours" / "burst_suite.py"
    text = suite.read_text()
    assert "max(times) - min(times)" in text
    suite.write_text(text.replace("max(times) - min(times)", "max(times)"))
    done = run(edited, tmp_path, *RUN, "test_burst.py", "--kv-burst-sizes=1,3", "--kv-resume=latest")
    assert done.code == 4
    assert "would mix two measurements: the code of neighbours has changed; measure again without" in done.err


def test_the_documentation_shows_the_package_as_it_is() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"`(neighbours/[\w.]+|pyproject.toml|test_burst.py)`[^\n]*\n\n```\w+\n(.*?)```", page, re.DOTALL)
    assert {name for name, _ in shown} >= {
        "neighbours/plain_engine.py", "neighbours/burst_suite.py", "neighbours/dilated_policy.py",
        "neighbours/spread_metric.py", "neighbours/burst_options.py", "pyproject.toml", "test_burst.py",
    }  # fmt: skip
    for name, code in shown:
        assert code.strip() == (PACKAGE / name).read_text(encoding="utf-8").strip(), name
