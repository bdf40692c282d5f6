from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.reporting.perplexity_csv import (
    COLUMNS,
    ORIGINAL_COLUMNS,
    SCHEMA_VERSION,
    append_results,
    append_row,
    check_results,
    csv_name,
    dataset_of,
    file_token,
    quantization_tag,
    read_rows,
)

SAMPLE = Path(__file__).parents[1] / "data" / "perplexity_original.csv"
PUBLISHED = Path("/work/shared/data/mlc_dse")


def our_row(**fields: Any) -> dict[str, Any]:
    row = dict.fromkeys(COLUMNS) | {
        "mlc_model": "HF://mlc-ai/Llama-3-8B-Instruct-q4f16_1-MLC",
        "hf_model": "a, model",
        "device": "cpu",
        "max_length": 2048,
        "stride": 512,
        "split": "test",
        "load_in_4bit": 0,
        "load_in_8bit": 0,
        "fake_q3bit": 0,
        "ppl": 1 / 3 + 20,
        "dataset": "wikitext2",
        "text_sha256": "c5b5",
        "num_tokens": 5000,
        "num_targets": 4999,
        "dtype": "float32",
        "nll_mean": 3.0,
        "protocol": "hf-strided",
        "perplexity_se": 0.25,
        "bos": "none",
        "run_id": "run-1",
        "schema_version": SCHEMA_VERSION,
    }
    return row | fields


def visible(folder: Path) -> list[Path]:
    """What is in ``folder`` but the lock file."""
    return [path for path in folder.iterdir() if path.name != ".ppl_results.lock"]


def test_the_originals_rows() -> None:
    rows = read_rows(SAMPLE)
    assert [quantization_tag(row) for row in rows] == ["fp16", "fake_q3", "4bit"]
    assert [row["ppl"] for row in rows] == [5.463742232026599, 15.250324658841208, 5.825128408723714]
    assert {(row["max_length"], row["stride"], row["split"], row["device"]) for row in rows} == {
        (2048, 512, "test", "cuda")
    }
    assert all(list(row) == list(COLUMNS) for row in rows)
    assert all(row[name] is None for row in rows for name in COLUMNS[len(ORIGINAL_COLUMNS) + 1 :])
    ratios = [round(row["ppl"] / rows[0]["ppl"], 3) for row in rows]
    assert ratios == [1.0, 2.791, 1.066]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published CSVs are not on this machine")
def test_the_published_files() -> None:
    two, three = (read_rows(PUBLISHED / csv_name(f"wikitext{n}")) for n in ("2", "103"))
    assert [row["ppl"] for row in two] == [row["ppl"] for row in three]
    assert {row["dataset"] for row in three} == {"wikitext103"}


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "not a perplexity CSV"),
        ("", "is empty"),
        ("\n", "is empty"),
        (",".join(ORIGINAL_COLUMNS[:-1]) + "\n", "lacks the column ppl"),
        (",".join((*ORIGINAL_COLUMNS, "ppl")) + "\n", "has the column ppl more than once"),
        (",".join((*ORIGINAL_COLUMNS, "note")) + "\n", "has the unknown column 'note'; mend"),
        (",".join(("", *ORIGINAL_COLUMNS)) + "\n", "has the unknown column ''"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,0,0,0,-5\n", "ppl is -5, at least 1 is possible"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,0,0,0,0.99\n", "at least 1"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,,cuda,2048,512,test,0,0,0,5\n", "hf_model is empty"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,,2048,512,test,0,0,0,5\n", "device is empty"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,,512,test,0,0,0,5\n", "max_length is empty"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048.5,512,test,0,0,0,5\n", "2048.5', no whole number"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,0,test,0,0,0,5\n", "stride is 0"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,2,0,0,5\n", "load_in_4bit is 2"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,True,maybe,0,5\n", "load_in_8bit is 'maybe'"),
        (
            ",".join(ORIGINAL_COLUMNS) + f"\n{'m' * 200_000},h,cuda,2048,512,test,0,0,0,5\n",
            "line 2 cannot be read as CSV",
        ),
        (",".join(ORIGINAL_COLUMNS) + '\nm,"h,cuda,2048,512,test,0,0,0,5\n', "cannot be read as CSV"),
        (",".join(ORIGINAL_COLUMNS) + "\na,b,c\n", "line 2 has 3 fields, 10 are needed"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,0,0,0,high\n", "line 2 is not a result"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,0,0,0,inf\n", "ppl is inf"),
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,0,0,0,\n", "line 2 is not a result"),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "w_ppl_results.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")


def test_the_datasets_name_is_the_files() -> None:
    assert dataset_of(Path("/x/wikitext103_ppl_results.csv")) == "wikitext103"
    assert csv_name("pg19") == "pg19_ppl_results.csv"


@pytest.mark.parametrize("dataset", ["../up", "a/b", "a b", "..", "", "x" * 300, "данные", "\udcff"])
def test_file_names_stay_in_the_folder(tmp_path: Path, dataset: str) -> None:
    token = file_token(dataset)
    assert (tmp_path / token).parent == tmp_path
    assert not token.startswith(".")
    assert len(csv_name(dataset)) < 120
    assert file_token("wikitext2") == "wikitext2"


def test_two_data_sets_never_share_a_file() -> None:
    names = ["a_b", "a/b", "a b", "a=_b", "x" * 200, "x" * 201]
    assert len({file_token(name) for name in names}) == len(names)


def test_a_path_as_a_name_is_written_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (path,) = append_results(folder, [our_row(dataset="../up")])
    assert [path] == visible(folder)
    assert visible(tmp_path) == [folder]
    assert read_rows(path)[0]["dataset"] == "../up"


def test_columns_in_another_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w_ppl_results.csv"
    order = ORIGINAL_COLUMNS[::-1]
    values = dict(zip(ORIGINAL_COLUMNS, ["m", "h", "cuda", "2048", "512", "test", "0", "1", "0", "5.5"], strict=True))
    path.write_text(",".join(order) + "\n" + ",".join(values[name] for name in order) + "\n")
    (row,) = read_rows(path)
    assert (row["hf_model"], row["ppl"], quantization_tag(row), row["dataset"]) == ("h", 5.5, "8bit", "w")


def test_what_pandas_saved_again_is_read(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "w_ppl_results.csv"
    append_results(tmp_path, [our_row(dataset="w", load_in_4bit=1), our_row(dataset="w", num_targets=None)])
    before = read_rows(path)
    frame = pd.read_csv(path)
    frame["load_in_4bit"] = frame["load_in_4bit"].astype(bool)
    frame["max_length"] = frame["max_length"].astype(float)
    frame.to_csv(path, index=False)
    assert "True" in path.read_text()
    assert "2048.0" in path.read_text()
    assert "4999.0" in path.read_text()
    assert read_rows(path) == before


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
        ({"hf_model": "a\r\nb"}, "hf_model="),
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
    with pytest.raises(UserError, match="line 3 has 1 fields"):
        check_results(tmp_path)


_WRITER = """
import sys
import tempfile
from pathlib import Path
from kvsuite.reporting.perplexity_csv import append_row, read_rows
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
        assert read_rows(path) == [row]
        check_results(Path(folder))
