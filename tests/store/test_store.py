from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_rows import environment, row, store_run

from kvsuite.errors import UserError
from kvsuite.record import RECORD_SCHEMA, RUN_SCHEMA
from kvsuite.store.files import parse_json, write_atomic
from kvsuite.store.records_file import read_records
from kvsuite.store.store import RecordStore, create_run_folder
from kvsuite.suites.outputs import write_outputs

NAME = re.compile(r"^[a-z0-9_]+_[A-Za-z0-9._-]+_\d{8}_\d{6}$")
START = datetime(2024, 12, 30, 15, 30, 45)


def store_rows(folder, run, rows):
    folder.mkdir(exist_ok=True)
    with RecordStore.create(folder, run) as store:
        for row in rows:
            store.append(row)
    return store.path


def test_folder_has_the_originals_name(tmp_path):
    folder = create_run_folder(
        tmp_path / "new" / "base", method="streaming_llm", model="/m/pythia-2.8b/", started=START
    )
    assert folder.name == "streaming_llm_pythia-2.8b_20241230_153045"
    assert folder.is_dir()


@given(method=st.text(max_size=300), model=st.text(max_size=300), when=st.datetimes(min_value=datetime(1000, 1, 1)))
def test_any_folder_name_matches_the_pattern(method, model, when):
    with tempfile.TemporaryDirectory() as base:
        folder = create_run_folder(Path(base), method=method, model=model, started=when)
        assert NAME.match(folder.name)
        assert folder.parent == Path(base)
        assert list(Path(base).iterdir()) == [folder]


def test_taken_folder_gets_a_suffix_and_is_left_alone(tmp_path):
    names = []
    for _ in range(3):
        folder = create_run_folder(tmp_path, method="dse", model="m", started=START)
        assert not list(folder.iterdir())
        (folder / "kept").write_text("x")
        names.append(folder.name)
    assert names == ["dse_m_20241230_153045", "dse_m_20241230_153045_2", "dse_m_20241230_153045_3"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_blocked_base_names_the_option(tmp_path, below):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(UserError, match=r"--kv-report-dir=.*file.*; give a folder") as caught:
        create_run_folder(blocker / below, method="dse", model="m", started=START)
    assert "\n" not in str(caught.value)
    assert blocker.read_text() == "in the way"


def test_round_trip(tmp_path, run, rows):
    rows[1]["unknown"] = {"kept": ["ä", 1e-300]}
    path = store_rows(tmp_path, run, rows)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert json.loads(lines[0])["schema"] == RUN_SCHEMA
    assert [json.loads(line)["schema"] for line in lines[1:]] == [RECORD_SCHEMA] * len(rows)
    for source in (tmp_path, path):
        assert read_records(source) == (run, rows, [])
    write_outputs(tmp_path, run, rows, figures=False)
    path.unlink()
    for source in (tmp_path, tmp_path / "report.json"):
        assert read_records(source) == (run, rows, [])


def test_run_line_is_completed_and_checked(tmp_path, run):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    del run["schema"], run["env"], run["kvsuite_version"]
    RecordStore.create(tmp_path / "a", run).close()
    found, rows, _ = read_records(tmp_path / "a")
    assert found["env"].startswith("sha256:")
    assert rows == []
    del run["seed"]
    with pytest.raises(UserError, match="'seed' is a required property"):
        RecordStore.create(tmp_path / "b", run)
    assert not list((tmp_path / "b").iterdir())


def test_second_store_in_one_folder_is_refused(tmp_path, run, rows):
    path = store_rows(tmp_path, run, rows)
    before = path.read_bytes()
    with pytest.raises(UserError, match="--kv-report-dir"):
        RecordStore.create(tmp_path, run)
    assert path.read_bytes() == before


def test_append_survives_a_killed_process(tmp_path, run, rows):
    (tmp_path / "input.json").write_text(json.dumps([run, rows[0]]))
    code = (
        "import json, os, pathlib, sys\n"
        "from kvsuite.store.store import RecordStore\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "run, row = json.loads((folder / 'input.json').read_text())\n"
        "RecordStore.create(folder, run).append(row)\n"
        "os._exit(9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120)
    assert ended.returncode == 9
    assert read_records(tmp_path)[1] == [rows[0]]


def test_full_disk_leaves_no_half_line(tmp_path, run, rows):
    (tmp_path / "input.json").write_text(json.dumps([run, rows[0], rows[1]]))
    code = (
        "import json, pathlib, resource, sys\n"
        "from kvsuite.errors import UserError\n"
        "from kvsuite.store.store import RecordStore\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "run, first, second = json.loads((folder / 'input.json').read_text())\n"
        "store = RecordStore.create(folder, run)\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (store.path.stat().st_size + 100, hard))\n"
        "try:\n"
        "    store.append(first)\n"
        "except UserError:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\n"
        "    store.append(second)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120, check=True)
    assert read_records(tmp_path)[1:] == ([rows[1]], [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_append_refuses_what_is_not_json(tmp_path, run, row, bad):
    store = RecordStore.create(tmp_path, run)
    with pytest.raises(ValueError, match="streaming_32"):
        store.append(row() | {"duration_s": bad})
    with pytest.raises(UserError, match=r"schema is 'kvsuite\.record/2'"):
        store.append(row() | {"schema": "kvsuite.record/2"})
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.append(row())
    assert read_records(tmp_path)[1] == []


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_cut_off_last_line_is_dropped_with_a_note(tmp_path, run, rows, cut):
    path = store_rows(tmp_path, run, rows)
    path.write_bytes(path.read_bytes()[:-cut])
    _, found, notes = read_records(path)
    if cut == 1:  # only the newline is gone, the record is whole
        assert (found, notes) == (rows, [])
    else:
        assert found == rows[:-1]
        assert len(notes) == 1
        assert f"line {len(rows) + 1} is cut off" in notes[0]


@given(data=st.data())
def test_any_cut_loses_at_most_the_last_line(data):
    rows = [{"schema": RECORD_SCHEMA, "id": str(number), "text": "ä" * number} for number in range(3)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in [{"schema": RUN_SCHEMA}, *rows]]
    whole = b"\n".join(lines) + b"\n"
    cut = data.draw(st.integers(len(lines[0]), len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        path.write_bytes(whole[:cut])
        _, found, notes = read_records(path)
    complete = whole[:cut].count(b"\n") - 1
    assert found[: max(complete, 0)] == rows[: max(complete, 0)]
    assert len(found) <= complete + 1 or not found
    assert len(notes) <= 1


@pytest.mark.parametrize("damage", [b"\x00" * 20, b'{"schema": "kvsuite.record/1"', b"[]", b'{"x": NaN}', b"\xff"])
@pytest.mark.parametrize("line", [0, 2, -1])
def test_damage_in_the_middle_names_its_line(tmp_path, run, rows, damage, line):
    path = store_rows(tmp_path, run, rows)
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=f"line {line % len(lines) + 1} is damaged"):
        read_records(path)


def test_other_schemas_are_refused(tmp_path, run, rows):
    path = store_rows(tmp_path, run, rows)
    text = path.read_text()
    path.write_text(text.replace("kvsuite.run/1", "kvsuite.run/2"))
    with pytest.raises(UserError, match=r"line 1: schema is 'kvsuite.run/2'"):
        read_records(path)
    path.write_text(text.replace("kvsuite.record/1", "other/1", 1))
    with pytest.raises(UserError, match=r"line 2: schema is 'other/1'"):
        read_records(path)
    report = tmp_path / "report.json"
    report.write_text('{"schema": "kvsuite.report/2"}')
    with pytest.raises(UserError, match=r"schema is 'kvsuite.report/2'"):
        read_records(report)


def test_missing_and_empty_name_the_path(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: cannot be read \(No such file"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no records.jsonl and no report.json"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(b'{"schema": "kvsu')
    with pytest.raises(UserError, match="not even the run line is there"):
        read_records(tmp_path)


def test_last_of_two_equal_ids_counts(tmp_path, run, rows):
    again = rows[1] | {"seed": 99}
    found_run, found, notes = read_records(store_rows(tmp_path, run, [*rows, again]))
    assert found == [rows[0], again, *rows[2:]]
    assert found_run == run
    assert len(notes) == 1
    assert rows[1]["id"] in notes[0]


def test_sidecar_round_trip(tmp_path, run):
    from pyarrow import parquet

    with RecordStore.create(tmp_path, run) as store:
        first = store.write_sidecar("a.py::t[hf-x/1]", {"text": [0, 0], "nll": [1.5, None], "hit": [True, False]})
        second = store.write_sidecar("a.py::t[hf-x_1]", {"nll": [2.5]})
    assert re.fullmatch(r"tokens/[A-Za-z0-9_.-]+\.parquet", first)
    assert first != second
    table = parquet.read_table(tmp_path / first).to_pydict()
    assert table == {"text": [0, 0], "nll": [1.5, None], "hit": [True, False]}
    assert len(list((tmp_path / "tokens").iterdir())) == 2


def test_a_sidecar_that_cannot_be_written_is_told(tmp_path, run):
    (tmp_path / "tokens").touch()
    with RecordStore.create(tmp_path, run) as store, pytest.raises(UserError, match=r"cannot make .+tokens"):
        store.write_sidecar("a", {"nll": [2.5]})


def test_names_of_files_that_are_not_utf8_are_kept(tmp_path):
    # as Python gives them: in what an error says, and in the command
    name = os.fsdecode(b"caf\xe9.bin")
    told = {"type": "OSError", "message": f"no file {name}", "phase": "load", "traceback": None}
    failed = row("a", "error", error=told)
    folder = store_run(tmp_path, [failed], environment=environment(command=["pytest", name]))
    run, rows, _ = read_records(folder)
    assert run["environment"]["command"][1] == name
    assert rows == [failed]
    write_outputs(folder, run, rows)
    assert read_records(folder / "report.json")[1][0]["error"] == told


@pytest.mark.parametrize("field", ["suite", "case", "status", "metrics"])
def test_a_record_that_lacks_a_field_is_named_before_anything_is_drawn(tmp_path, field):
    damaged = row("a")
    del damaged[field]
    folder = store_run(tmp_path, [damaged, row("b")])
    run, rows, _ = read_records(folder)
    with pytest.raises(UserError, match=f"'{field}' is a required property"):
        write_outputs(folder, run, rows)
    assert [path.name for path in folder.iterdir()] == ["records.jsonl"]


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_text() == "new"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "folder", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


RUN = {
    "run_id": "r", "method": "m", "model": "m", "started_utc": "2026", "command": ["pytest"], "options": {},
    "environment": {"host": "a"}, "seed": 0,
}  # fmt: skip


CUT_ROWS = [{"schema": RECORD_SCHEMA, "id": f"é{n}", "status": "ok"} for n in range(4)]


@functools.cache
def file_to_cut() -> tuple[str, bytes]:
    """Name and bytes of a whole file: every row of it waits for the disk, so it is written once."""
    with tempfile.TemporaryDirectory() as base:
        path = store_rows(Path(base) / "run", RUN, CUT_ROWS)
        return path.name, path.read_bytes()


@settings(max_examples=200)
@given(cut=st.integers(0, 10_000), junk=st.binary(max_size=20))
def test_a_file_cut_anywhere_gives_its_whole_lines_or_says_why_not(cut, junk):
    with tempfile.TemporaryDirectory() as base:
        folder, rows = Path(base), CUT_ROWS
        name, whole = file_to_cut()
        path = folder / name
        kept = whole[: cut % (len(whole) + 1)]
        # a whole object would be a line of its own
        tail = junk.replace(b"\n", b"").replace(b"{", b"")
        path.write_bytes(kept + tail)
        # a line that lacks nothing but its end is one
        only_run = kept == whole.partition(b"\n")[0] and not tail.strip(b"\0 \t\r")
        if kept.count(b"\n") == 0 and not only_run:
            with pytest.raises(UserError):
                read_records(folder)
            return
        _, found, notes = read_records(folder)
        lines = max(kept.count(b"\n") - 1, 0)
        assert found[:lines] == rows[:lines]
        assert len(found) - lines in (0, 1)
        if not only_run and len(found) == lines and (kept + tail).rstrip(b"\0") != kept[: kept.rfind(b"\n") + 1]:
            assert "is cut off and was left out" in notes[0]
        # what goes on with it reads the same, and adds to it
        with RecordStore.reopen(folder) as store:
            store.append({"schema": RECORD_SCHEMA, "id": "new"})
        assert [row["id"] for row in read_records(folder)[1]] == [row["id"] for row in found] + ["new"]


def test_blocks_of_zeros_that_a_power_cut_leaves_are_no_line(tmp_path):
    path = store_rows(tmp_path / "run", RUN, [{"schema": RECORD_SCHEMA, "id": "a"}])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 4096)
    assert [row["id"] for row in read_records(path)[1]] == ["a"]
    # a row that lacks nothing but its end of line
    path.write_bytes(whole[:-1] + b"\0" * 4096)
    assert [row["id"] for row in read_records(path)[1]] == ["a"]
    path.write_bytes(whole[:-5] + b"\0" * 4096)
    run, rows, notes = read_records(path)
    assert (run["run_id"], rows) == ("r", [])
    assert "line 2 is cut off" in notes[0]


def test_environments_of_further_processes_are_sessions(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with RecordStore.create(folder, RUN) as store:
        store.append({"schema": RECORD_SCHEMA, "id": "a"})
        told = store.append_session(RUN | {"environment": {"host": "b"}, "command": ["pytest", "--kv-resume=latest"]})
        store.append({"schema": RECORD_SCHEMA, "id": "b"})
    run, rows, _ = read_records(folder)
    assert run["environment"] == {"host": "a"}
    assert [row["id"] for row in rows] == ["a", "b"]
    assert run["sessions"] == [told]
    assert told["environment"] == {"host": "b"}
    assert told["env"] != run["env"]


def test_a_disk_that_fills_up_keeps_the_rows_before(tmp_path):
    # a limit of the file's size stands in for the disk's
    code = """
import resource, signal, sys
from pathlib import Path
from kvsuite.errors import UserError
from kvsuite.record import RECORD_SCHEMA
from kvsuite.store.store import RecordStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RecordStore.reopen(Path(sys.argv[1])) as store:
    size = store.path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2000, size + 2000))
    try:
        for number in range(100):
            store.append({"schema": RECORD_SCHEMA, "id": f"n{number}", "filler": "x" * 500})
    except UserError as error:
        print(number, error)
"""
    path = store_rows(tmp_path / "run", RUN, [{"schema": RECORD_SCHEMA, "id": "a"}])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path.parent)], capture_output=True, text=True, check=True, timeout=60
    )
    written, _, message = done.stdout.partition(" ")
    assert "make room on that disk" in message
    _, rows, notes = read_records(path)
    assert [row["id"] for row in rows] == ["a", *(f"n{number}" for number in range(int(written)))]
    assert int(written) == 3
    assert not notes


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_folder_that_went_away_while_it_was_written(tmp_path, how):
    with RecordStore.reopen(store_run(tmp_path, [row("first")])) as store:
        store.require_in_place()
        if how == "deleted":
            shutil.rmtree(store.folder)
        else:
            store.folder.rename(tmp_path / "elsewhere")
        if how == "replaced":
            shutil.copytree(tmp_path / "elsewhere", store.folder)
        with pytest.raises(UserError, match="was deleted or moved while the run wrote it"):
            store.append(row("second"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=10,
    ),
    st.booleans(),
)
def test_json_is_read_as_python_reads_it(document, escaped):
    data = json.dumps(document, ensure_ascii=escaped).encode("utf-8", "backslashreplace")
    if b"Infinity" in data and any(map(_is_infinite, _leaves(document))):
        with pytest.raises(ValueError, match="is not JSON"):
            parse_json(data)
    else:
        assert parse_json(data) == json.loads(data)
    with pytest.raises(ValueError, match=r"Extra data|is not JSON"):
        parse_json(data + b"]")


def _leaves(document):
    if isinstance(document, list | dict):
        return [
            leaf for one in (document.values() if isinstance(document, dict) else document) for leaf in _leaves(one)
        ]
    return [document]


def _is_infinite(leaf):
    return isinstance(leaf, float) and math.isinf(leaf)
