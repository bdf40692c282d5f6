"""The one line of a run: while it goes on, when it is not heard of any more, and when it is over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from record_rows import build_row, build_run

from kvsuite.commands.arguments import Parser
from kvsuite.commands.status import add_parser
from kvsuite.distribution.run_status import STATUS_FILE, RunStatus, clear_status, status_line, write_status
from kvsuite.errors import UserError
from kvsuite.reporting.page.render import PAGE_FILE
from kvsuite.store.store import RecordStore

GOING_ON = RunStatus(
    {"ok": 10, "crashed": 1, "skipped": 1}, 48, {"b (10.0.0.2, 2f)": 1, "a (10.0.0.1, 1f)": 2}, 1, 190.0
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with RecordStore.create(tmp_path, build_run(cases=3)) as store:
        store.append(build_row("baseline"))
        store.append(build_row("streaming_32", status="crashed", reason="gone"))
    return tmp_path


def test_a_run_that_goes_on_says_all_in_one_line(folder: Path) -> None:
    write_status(folder, GOING_ON)
    line = "12 of 60 done, 1 failed; running: a (10.0.0.1, 1f) 2, b (10.0.0.2, 2f) 1; 1 worker(s) starting; about 3 min left"
    assert status_line(folder, PAGE_FILE) == line == GOING_ON.line()


def test_a_status_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    write_status(tmp_path / "deleted", GOING_ON)
    assert not (tmp_path / "deleted").exists()


def test_one_that_is_not_heard_of_is_no_run_that_goes_on(folder: Path) -> None:
    write_status(folder, GOING_ON)
    past = time.time() - 3600
    os.utime(folder / STATUS_FILE, (past, past))
    assert (
        status_line(folder, PAGE_FILE)
        == f"12 of 60 done, 1 failed; not heard of for 60 min; go on with --kv-resume={folder}"
    )


def test_one_that_is_over_is_told_by_its_records(folder: Path) -> None:
    write_status(folder, GOING_ON)
    clear_status(folder)
    (folder / PAGE_FILE).touch()
    assert status_line(folder, PAGE_FILE) == f"2 of 3 done, 1 failed; go on with --kv-resume={folder}"
    (folder / STATUS_FILE).write_text("{")
    assert status_line(folder, PAGE_FILE).startswith("2 of 3 done"), "a file that cannot be read says nothing"
    with RecordStore.reopen(folder) as store:
        store.append(build_row("streaming_32"))
        store.append(build_row("streaming_64"))
    assert status_line(folder, PAGE_FILE) == "3 done", "of two rows of a case the last counts"


def test_nobody_is_asked_to_go_on_with_what_another_process_writes(folder: Path) -> None:
    assert status_line(folder, PAGE_FILE) == "2 of 3 done, 1 failed", "it has no report yet"
    (folder / PAGE_FILE).touch()
    past = time.time() - 60
    os.utime(folder / PAGE_FILE, (past, past))
    assert status_line(folder, PAGE_FILE) == "2 of 3 done, 1 failed", "the report is of before it was resumed"


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    add_parser(parser.add_subparsers())
    for given in (folder, folder / "records.jsonl"):
        arguments = parser.parse_args(["status", str(given)])
        assert arguments.run(arguments) == 0
        assert capsys.readouterr().out.startswith("2 of 3 done, 1 failed")
    arguments = parser.parse_args(["status", str(folder / "no")])
    with pytest.raises(UserError, match=r"no records\.jsonl in .*; give the folder of a run"):
        arguments.run(arguments)
