from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kvsuite.errors import UserError
from kvsuite.reporting.perplexity_csv import (
    COLUMNS,
    ORIGINAL_COLUMNS,
    SCHEMA_VERSION,
    append_row,
    csv_name,
    csv_row,
    dataset_of,
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


def record(**fields: Any) -> dict[str, Any]:
    metrics = {"perplexity": 20.5, "perplexity_se": 0.2, "nll_sum": 15000.0, "nll_tokens": 4999.0, "score_s": 12.5}
    return {
        "id": "test_perplexity[wikitext2-4bit]",
        "status": "ok",
        "case": {
            "model": "smollm2",
            "device": "cpu",
            "dtype": "float32",
            "quantization": "4bit",
            "params": {"mlc_model": "q4"},
            "workload": {"max_length": 2048, "stride": 512, "split": "test", "protocol": "hf-strided", "bos": "none"},
        },
        "effective": {"dtype": "float32", "device": "cpu"},
        "dataset": {"name": "wikitext2", "text_hash": "sha256:c5b5"},
        "tokens": {"text": 5000},
        "metrics": {name: {"value": value} for name, value in metrics.items()},
        **fields,
    }


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
    assert list(tmp_path.iterdir()) == [path]


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
        ("", "not a perplexity CSV"),
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


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("fake", "four", "eight", "tag"),
    [(1, 1, 1, "fake_q3"), (0, 1, 1, "4bit"), (0, 0, 1, "8bit"), (0, 0, 0, "fp16")],
)
def test_the_originals_tags(fake: int, four: int, eight: int, tag: str) -> None:
    row = dict.fromkeys(COLUMNS) | {"fake_q3bit": fake, "load_in_4bit": four, "load_in_8bit": eight}
    assert quantization_tag(row) == tag


def test_our_tags_say_the_dtype_and_the_format() -> None:
    assert quantization_tag(our_row()) == "float32"
    assert quantization_tag(our_row(quantization="q4f16_1")) == "q4f16_1"


def test_a_row_of_a_record(tmp_path: Path) -> None:
    row = csv_row(record(), run_id="run-7")
    assert list(row) == list(COLUMNS)
    assert (row["load_in_4bit"], row["load_in_8bit"], row["fake_q3bit"]) == (1, 0, 0)
    assert (row["ppl"], row["num_targets"], row["num_tokens"], row["seconds"]) == (20.5, 4999, 5000, 12.5)
    assert row["nll_mean"] == pytest.approx(15000 / 4999)
    assert (row["text_sha256"], row["run_id"], row["quantization"]) == ("c5b5", "run-7", "4bit")
    assert row["ppl_original_formula"] is None
    path = tmp_path / csv_name("wikitext2")
    append_row(path, row)
    assert read_rows(path) == [row]
    assert math.isfinite(row["ppl"])


def test_a_failed_case_has_no_row() -> None:
    with pytest.raises(ValueError, match="no perplexity, so no row"):
        csv_row(record(status="oom"), run_id="run-7")
    with pytest.raises(ValueError, match="no perplexity"):
        csv_row(record(metrics={"perplexity": {"value": None, "reason": "random weights"}}), run_id="run-7")


def test_the_datasets_name_is_the_files() -> None:
    assert dataset_of(Path("/x/wikitext103_ppl_results.csv")) == "wikitext103"
    assert csv_name("pg19") == "pg19_ppl_results.csv"
