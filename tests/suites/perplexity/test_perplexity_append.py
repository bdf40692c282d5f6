from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perplexity_samples import our_row

from kvsuite.errors import UserError
from kvsuite.foreign_text import csv_cell
from kvsuite.suites.perplexity.csv_files import (
    COLUMNS,
    ORIGINAL_COLUMNS,
    append_results,
    append_row,
    check_results,
    csv_name,
    read_rows,
)


def visible(folder: Path) -> list[Path]:
    """What is in ``folder`` but the lock file."""
    return [path for path in folder.iterdir() if path.name != ".ppl_results.lock"]


def test_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / csv_name("wikitext2")
    rows = [our_row(), our_row(ppl=21.0, quantization="q4f16_1", perplexity_se=None), our_row(fake_q3bit=1)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    header, first = path.read_text().split("\n")[:2]
    assert header.startswith(",".join(ORIGINAL_COLUMNS) + ",dataset,text_sha256,")
    assert '"a, model"' in first
    assert visible(tmp_path) == [path]


def test_a_file_without_a_last_line_end_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "w_ppl_results.csv"
    append_row(path, our_row())
    path.write_text(path.read_text().rstrip("\n"))
    append_row(path, our_row(ppl=3.0))
    assert [row["ppl"] for row in read_rows(path)] == [our_row()["ppl"], 3.0]


@pytest.mark.parametrize("header", [",".join(ORIGINAL_COLUMNS), ",".join(COLUMNS[::-1]), "something else"])
def test_another_header_is_not_appended_to(tmp_path: Path, header: str) -> None:
    path = tmp_path / "w_ppl_results.csv"
    path.write_text(header + "\n")
    with pytest.raises(UserError, match="its header is not the one that kvsuite writes"):
        append_row(path, our_row())
    assert path.read_text() == header + "\n"


def test_a_row_has_all_columns_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "w_ppl_results.csv"
    with pytest.raises(ValueError, match="columns differ: \\['extra'\\]"):
        append_row(path, our_row(extra=1))
    row = our_row()
    del row["bos"]
    with pytest.raises(ValueError, match="columns differ: \\['bos'\\]"):
        append_row(path, row)
    assert not path.exists()


def test_a_path_as_a_name_is_written_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (path,) = append_results(folder, [our_row(dataset="../up")])
    assert [path] == visible(folder)
    assert visible(tmp_path) == [folder]
    assert read_rows(path)[0]["dataset"] == "../up"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ppl": float("inf")}, "ppl is inf"),
        ({"ppl": -5.0}, "at least 1"),
        ({"perplexity_se": float("nan")}, "perplexity_se is nan"),
        ({"ppl": None}, "ppl is empty"),
        ({"hf_model": ""}, "hf_model is empty"),
        ({"dataset": None}, "dataset is empty"),
        ({"max_length": 2048.5}, "max_length=2048.5"),
        ({"hf_model": "x" * 200_000}, "could not be read again"),
        ({"schema_version": 2}, "schema_version is 2"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    append_results(tmp_path, [our_row()])
    before = (tmp_path / csv_name("wikitext2")).read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        append_results(tmp_path, [our_row(ppl=3.0), our_row(**fields)])
    # a fault of the program, not of its user
    assert not isinstance(caught.value, UserError)
    assert (tmp_path / csv_name("wikitext2")).read_bytes() == before


def test_numbers_of_numpy_are_plain_numbers(tmp_path: Path) -> None:
    import numpy as np

    append_results(
        tmp_path,
        [our_row(ppl=np.float64(20.1), seconds=np.float32(1.5), num_tokens=np.int64(7), load_in_4bit=np.bool_(True))],
    )
    path = tmp_path / csv_name("wikitext2")
    assert "np." not in path.read_text()
    (row,) = read_rows(path)
    assert (row["ppl"], row["seconds"], row["num_tokens"], row["load_in_4bit"]) == (20.1, 1.5, 7, 1)


def test_no_file_grows_before_all_headers_were_checked(tmp_path: Path) -> None:
    foreign = tmp_path / csv_name("pg19")
    foreign.write_text(",".join(ORIGINAL_COLUMNS) + "\n")
    with pytest.raises(UserError, match=str(foreign)):
        append_results(tmp_path, [our_row(), our_row(dataset="pg19")])
    assert visible(tmp_path) == [foreign]


def test_results_of_several_data_sets_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / csv_name("pg19")).touch()
    rows = [our_row(), our_row(dataset="pg19"), our_row(ppl=3.0)]
    paths = append_results(tmp_path, rows)
    assert paths == [tmp_path / csv_name("wikitext2"), tmp_path / csv_name("pg19")]
    assert read_rows(paths[0]) == [rows[0], rows[2]]
    assert read_rows(paths[1]) == [rows[1]]
    assert append_results(tmp_path, []) == []


def test_the_same_case_of_the_same_run_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / csv_name("wikitext2")
    row = our_row(case_key="sha256:1")
    assert append_results(tmp_path, [row, row]) == [path]
    before = path.read_bytes()
    assert append_results(tmp_path, [row]) == []
    append_row(path, row | {"ppl": 9.0})
    assert path.read_bytes() == before
    assert append_results(tmp_path, [row | {"run_id": "run-2"}, row | {"case_key": "sha256:2"}, row]) == [path]
    assert [(each["run_id"], each["case_key"]) for each in read_rows(path)] == [
        ("run-1", "sha256:1"),
        ("run-2", "sha256:1"),
        ("run-1", "sha256:2"),
    ]


def test_foreign_files_are_found_before_a_run(tmp_path: Path) -> None:
    check_results(tmp_path / "not there yet")
    append_results(tmp_path, [our_row()])
    (tmp_path / "notes.csv").write_text("a,b\n")
    check_results(tmp_path)
    foreign = tmp_path / csv_name("pg19")
    foreign.write_text(",".join(ORIGINAL_COLUMNS) + "\n")
    with pytest.raises(UserError, match=r"pg19_ppl_results\.csv: its header is not the one that kvsuite writes"):
        check_results(tmp_path)
    check_results(tmp_path, ["wikitext2", "c4"])
    with pytest.raises(UserError, match="pg19"):
        check_results(tmp_path, ["wikitext2", "pg19"])
    foreign.write_text(",".join((*COLUMNS, "note")) + "\n")
    with pytest.raises(UserError, match="unknown column 'note'"):
        check_results(tmp_path)
    foreign.unlink()
    with (tmp_path / csv_name("wikitext2")).open("a") as file:
        file.write("half a row")
    with pytest.raises(UserError, match="line 3 has 1 field, "):
        check_results(tmp_path)


_WRITER = """
import sys
import tempfile
from pathlib import Path
from kvsuite.suites.perplexity.csv_files import append_row, read_rows
path, worker = Path(sys.argv[1]), sys.argv[2]
(first,) = read_rows(path)[:1]
for index in range(10):
    append_row(path, first | {"run_id": worker, "case_key": str(index)})
"""


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / csv_name("wikitext2")
    append_row(path, our_row())
    workers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(worker)]) for worker in range(4)]
    assert [worker.wait(timeout=240) for worker in workers] == [0] * 4
    found = {(row["run_id"], row["case_key"]) for row in read_rows(path)[1:]}
    assert found == {(str(worker), str(index)) for worker in range(4) for index in range(10)}
    assert len(read_rows(path)) == 41


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(UserError, match=r"cannot be locked .*; give a folder that can be written"):
        append_results(blocked, [our_row()])


@given(model=st.text(), dataset=st.text(), ppl=st.floats(), seconds=st.none() | st.floats())
def test_every_row_is_refused_or_comes_back(model: str, dataset: str, ppl: float, seconds: float | None) -> None:
    row = our_row(hf_model=model, dataset=dataset, ppl=ppl, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        try:
            (path,) = append_results(Path(folder), [row])
        except ValueError:
            assert visible(Path(folder)) == []
            return
        assert path.parent == Path(folder)
        assert read_rows(path) == [{name: csv_cell(value) for name, value in row.items()}]
        check_results(Path(folder))
