from __future__ import annotations

from pathlib import Path

import pytest
from perplexity_samples import SAMPLE, our_row

from kvsuite.errors import UserError
from kvsuite.suites.perplexity.csv_files import (
    COLUMNS,
    ORIGINAL_COLUMNS,
    append_results,
    csv_name,
    dataset_of,
    file_token,
    quantization_tag,
    read_rows,
)

PUBLISHED = Path("/work/shared/data/mlc_dse")


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
        (",".join(ORIGINAL_COLUMNS) + "\nm,h,cuda,2048,512,test,0,0,0,5\na\n", "line 3 has 1 field, 10 are needed"),
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
