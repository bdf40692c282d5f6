"""The benchmarks of this repository from its root, on the tiny dummy model: a run, its files, a redraw, an interruption."""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pytest_runs import Run, run_module, run_pytest, start_pytest

from kvsuite.store.validate import validate

ROOT = Path(__file__).parents[2]
FOLDER = re.compile(r"^[a-z0-9_]+_[A-Za-z0-9._-]+_\d{8}_\d{6}$")
FILES = {
    "records.jsonl",
    "report.html",
    "report.json",
    "results.json",
    "table.txt",
    "benchmark_comparison.png",
    "benchmark_comparison.svg",
}
# sizes that leave and sizes that do not leave room for the 24 tokens of a request
COMMAND = (
    "benchmarks", "-k", "compression", "--kv-model=dummy:tiny", "--kv-device=cpu", "--kv-threads=1", "--kv-prompt-tokens=16",
    "--kv-max-new-tokens=8",
    "--kv-start-size=2", "--kv-recent-sizes=4,100", "--kv-fix-kv-sizes=8", "--kv-keep-ratios=0.5", "--kv-rounds=2",
    "--kv-num-warmup=1", "--kv-method=streaming_llm,fix_size_l2,l2_compress", "--kv-prune-after=4",
    "-p", "no:cacheprovider", "-p", "no:benchmark",
)  # fmt: skip
NAMES = [
    "baseline", "recent_only_6", "recent_only_102", "recent_only_8", "streaming_6", "streaming_102",
    "fix8_keep_low_kr=0.5", "l2_kr=0.5_single_shot",
]  # fmt: skip


@dataclass
class Finished:
    """A run and its only folder."""

    done: Run
    folder: Path
    run: dict[str, Any]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    base = tmp_path_factory.mktemp("reports")
    done = run_pytest(ROOT, *COMMAND, f"--kv-report-dir={base}")
    (folder,) = base.iterdir()
    run, *rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return Finished(done, folder, run, rows)


@pytest.fixture(scope="module")
def redrawn(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("redrawn")
    done = run_module(ROOT, "kvsuite", "report", str(finished.folder / "records.jsonl"), "--out", str(folder))
    assert (done.code, done.err) == (0, "")
    return folder


def test_run_passes_and_says_where_its_files_are(finished: Finished) -> None:
    assert finished.done.code == 0
    assert f"{len(NAMES)} passed" in finished.done.out
    assert f"records and figures: {finished.folder}" in finished.done.out
    assert f"report: {finished.folder / 'report.html'}" in finished.done.out


def test_folder_name_and_files(finished: Finished) -> None:
    assert FOLDER.fullmatch(finished.folder.name)
    assert finished.folder.name.startswith("compare_all_dummy-tiny_")
    assert {path.name for path in finished.folder.iterdir()} == FILES
    assert all(path.stat().st_size for path in finished.folder.iterdir())


def test_rows_are_valid_and_complete(finished: Finished) -> None:
    validate("run", finished.run, "run line")
    for row in finished.rows:
        validate("record", row, row["id"])
    by_place = sorted(finished.rows, key=lambda row: row["case_index"])
    assert [row["case"]["name"] for row in by_place] == NAMES
    assert len({row["case_key"] for row in finished.rows}) == len(NAMES)


def test_cache_sizes_are_the_methods(finished: Finished) -> None:
    # 16 prompt tokens and 8 generated ones, the last of which is never fed
    expected = dict.fromkeys(NAMES, 23) | {"recent_only_6": 6, "recent_only_8": 8, "streaming_6": 6}
    expected |= {"fix8_keep_low_kr=0.5": 8, "l2_kr=0.5_single_shot": 8 + 7}
    found = {row["case"]["name"]: row["metrics"]["cache_tokens_max"]["value"] for row in finished.rows}
    assert found == expected
    per_token = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
    for row in finished.rows:
        assert row["metrics"]["kv_bytes_exact"]["value"] == expected[row["case"]["name"]] * per_token


def test_quality_of_random_weights_is_null_with_the_reason(finished: Finished) -> None:
    for row in finished.rows:
        entry = row["metrics"]["perplexity"]
        assert (entry["value"], entry["reason"]) == (None, "random weights")


def test_terminal_shows_the_table(finished: Finished) -> None:
    table = (finished.folder / "table.txt").read_text().strip()
    assert table in finished.done.out
    header = ["Method", "TTFT(s)", "TPOT(s)", "Thruput", "PPL", "Acc", "VRAM(GB)", "Cache"]
    assert table.split("\n")[0].split()[:8] == header


# the page links to what lies beside it, and the records do not lie there
@pytest.mark.parametrize("name", sorted(FILES - {"records.jsonl", "report.html"}))
def test_redraw_gives_the_same_bytes(name: str, finished: Finished, redrawn: Path) -> None:
    assert (redrawn / name).read_bytes() == (finished.folder / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_keeps_the_finished_rows_and_draws_them(tmp_path: Path, number: signal.Signals) -> None:
    # rounds long enough that the signal meets a case, not the end of the run
    long = (*COMMAND, "--kv-rounds=10", "--kv-max-new-tokens=64", f"--kv-report-dir={tmp_path}")
    with start_pytest(ROOT, *long) as under_way:
        # a slow machine prints lines inside the first case too
        while not re.search(r"^ *\[1/.*elapsed", under_way.out(), re.MULTILINE) and not under_way.forked.is_over():
            time.sleep(0.01)
        under_way.forked.send_signal(number)
        if number == signal.SIGTERM:
            # as timeout(1) does: to the process, then to its group
            time.sleep(0.02)
            under_way.forked.send_signal(number)
        done = under_way.end()
    said = done.out + done.err
    assert done.code == pytest.ExitCode.INTERRUPTED, said
    (folder,) = tmp_path.iterdir()
    run, *rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert 1 <= len(rows) < len(NAMES)
    assert {row["status"] for row in rows} == {"ok"}
    report = json.loads((folder / "report.json").read_text())
    assert len(report["records"]) == len(rows)
    assert report["run"]["run_id"] == run["run_id"] == folder.name
    assert {path.name for path in folder.iterdir()} == FILES
    assert f"records and figures: {folder}" in said
    assert f"partial: {len(rows)} of {len(NAMES)} cases have a record" in (folder / "table.txt").read_text()
    assert f"partial: {len(rows)} of {len(NAMES)} cases have a record" in said
    assert "Traceback" not in said
