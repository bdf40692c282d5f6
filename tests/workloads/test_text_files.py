from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvsuite.errors import UserError
from kvsuite.workloads.corpus import load_corpus
from kvsuite.workloads.text_files import text_rows

ROWS = ["short", "a text that is long enough", "x" * 100, "y" * 200]
KINDS = ["jsonl", "json", "jsonl.gz", "json.gz", "parquet", "arrow", "stream.arrow", "disk", "dict"]


@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_of_file(tmp_path: Path, write_rows: Callable[..., Path], kind: str, column: str) -> None:
    path = write_rows(tmp_path, kind, ROWS, column)
    corpus = load_corpus(str(path), num_texts=4)
    assert corpus.texts == tuple(ROWS)
    assert (corpus.name, corpus.source) == (path.name, str(path))
    # the first texts that qualify, not the first rows
    assert load_corpus(str(path), num_texts=2, min_chars=20).texts == (ROWS[1], ROWS[2])
    assert load_corpus(str(path), num_texts=1, min_chars=200).texts == (ROWS[3],)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_texts(tmp_path: Path, write_rows: Callable[..., Path], kind: str) -> None:
    path = write_rows(tmp_path, kind, ROWS)
    with pytest.raises(UserError, match=r"only 2 text\(s\) with at least 50 characters, 3 asked"):
        load_corpus(str(path), num_texts=3, min_chars=50)


@pytest.mark.parametrize("kind", KINDS)
def test_text_column_must_be_clear(tmp_path: Path, write_rows: Callable[..., Path], kind: str) -> None:
    path = write_rows(tmp_path, kind, [{"title": "a", "body": "b", "n": 1}], column="")
    with pytest.raises(UserError, match=r"no column text.*body, n, title.*rename") as caught:
        load_corpus(str(path), num_texts=1)
    assert str(caught.value).startswith(f"--kv-corpus={path}")


@pytest.mark.parametrize("kind", KINDS)
def test_file_without_a_column_of_strings(tmp_path: Path, write_rows: Callable[..., Path], kind: str) -> None:
    path = write_rows(tmp_path, kind, [{"n": 1, "text": 2}], column="")
    with pytest.raises(UserError, match=r"--kv-dataset=.*nor any other column of strings.*n, text; give a file"):
        load_corpus(str(path), num_texts=1, option="--kv-dataset")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [["", " \n"], ["\t"]])
def test_blank_corpus(tmp_path: Path, write_rows: Callable[..., Path], kind: str, rows: list[Any]) -> None:
    path = write_rows(tmp_path, kind, rows)
    with pytest.raises(UserError, match=r"no text in it, or blanks only; give another corpus") as caught:
        load_corpus("wikitext2", path=str(path), num_texts=1, option="--kv-dataset-path", split="test")
    assert str(caught.value).startswith(f"--kv-dataset-path={path}: ")


@pytest.mark.parametrize("kind", ["txt", "raw", "jsonl", "json", "jsonl.gz"])
def test_file_of_no_bytes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no text in it"):
        load_corpus(str(path), num_texts=1)


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz"])
def test_only_the_first_rows_of_a_large_compressed_file_are_read(tmp_path: Path, kind: str) -> None:
    """The shards of C4 are JSON lines under either name. Of a damaged one everything before the damage can be had."""
    lines = "\n".join(json.dumps({"url": f"u{i}", "text": f"text {i}"}) for i in range(100_000))
    path = tmp_path / f"x.{kind}"
    path.write_bytes(gzip.compress(lines.encode())[:-1000])
    assert load_corpus(str(path), num_texts=3).texts == ("text 0", "text 1", "text 2")
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus(str(path), num_texts=100_000)


def test_the_text_column_of_json_is_that_of_the_first_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"url": "u", "text": ""}\n\n{"url": "v", "text": "words\u2028more"}\n', encoding="utf-8")
    rows = list(text_rows(path, typed="--kv-corpus=x.jsonl", split="test"))
    assert rows == ["", "words\u2028more"]


@pytest.mark.parametrize("at", [0, 1, 69])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_text_is_no_empty_text(
    tmp_path: Path, write_rows: Callable[..., Path], kind: str, at: int
) -> None:
    rows: list[Any] = [f"text {row}" for row in range(70)]
    rows[at] = None
    path = write_rows(tmp_path, kind, rows)
    with pytest.raises(UserError) as caught:
        load_corpus(str(path), num_texts=70)
    assert str(caught.value) == (
        f"--kv-corpus={path}: row {at + 1} of {path} has no text in the column text; remove the row, or give another column "
        "the name text"
    )
    # rows that nobody needs are not read
    if at:
        assert load_corpus(str(path), num_texts=at).texts == tuple(rows[:at])


def test_a_row_without_the_column_is_no_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "words"}\n{"body": "words"}\n')
    with pytest.raises(UserError, match=r"row 2 of .*x\.jsonl has no text in the column text; remove the row"):
        load_corpus("wikitext2", path=str(path), num_texts=1, option="--kv-dataset-path")


@pytest.mark.parametrize("kind", ["txt", "raw", "jsonl"])
def test_another_encoding_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes('{"text": "Zürich"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.\w+: is not UTF-8 \(.* at byte \d+\); save it as UTF-8$"):
        load_corpus(str(path), num_texts=1)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', "line 3 cannot be read as JSON (Expecting ',' delimiter, column 13)"),
        ('{"text": \n', "line 1 cannot"),
        ('\n[{"text": "a"},\n {"text": b}]', "line 3 cannot be read as JSON (Expecting value, column 11)"),
    ],
)
def test_the_broken_line_of_a_json_file_is_named(tmp_path: Path, content: str, where: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_corpus(str(path), num_texts=2)
    assert str(caught.value).startswith(f"--kv-corpus={path}: {where}")
    assert "; mend or remove it" in str(caught.value)


def test_number_among_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "words"}\n{"text": 5}\n')
    with pytest.raises(UserError, match=r"a row has '5' in the column text; give"):
        load_corpus(str(path), num_texts=2)


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {split: Dataset.from_dict({"text": [f"the {split} text"]}) for split in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    path = str(tmp_path / "both")
    for split in ("train", "test"):
        assert load_corpus(path, num_texts=1, split=split).texts == (f"the {split} text",)
    with pytest.raises(UserError, match=r"--kv-dataset=.*no split 'validation'; the folder has train, test; take one"):
        load_corpus(path, num_texts=1, split="validation", option="--kv-dataset")
    # the folder of one split is a data set of its own
    assert load_corpus(str(tmp_path / "both" / "train"), num_texts=1).texts == ("the train text",)


def test_saved_format_hides_nothing(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["words"], "n": [1]}).with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "x")
    assert load_corpus(str(tmp_path / "x"), num_texts=1).texts == ("words",)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no JSON", '{"splits": 5}', '{"_data_files": [{"filename": "no.arrow"}]}']
)
@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_damaged_saved_folder(tmp_path: Path, write_rows: Callable[..., Path], name: str, content: str) -> None:
    path = write_rows(tmp_path, "disk" if name == "state.json" else "dict", ROWS)
    (path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_corpus(str(path), num_texts=1)
    assert str(caught.value).startswith(f"--kv-corpus={path}: ")
    assert "give" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", b"\xff\xfe\x00\xd8"),
        ("x.jsonl", b'{"text": '),
        ("x.jsonl", b'{"text": "\xff"}'),
        ("x.jsonl", b'"words"\n'),
        ("x.json", b"[1, 2]"),
        ("x.json.gz", b'{"text": "not compressed"}'),
        ("x.jsonl.gz", gzip.compress(b'{"text": "words"}', mtime=0)[:-9]),
        ("x.parquet", b"no parquet"),
        ("x.parquet", b""),
        ("x.arrow", b"no arrow"),
        ("x.arrow", b""),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_corpus(str(path), num_texts=1)
    assert str(caught.value).startswith(f"--kv-corpus={path}: ")
    assert re.search("give|save it as UTF-8", str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["arrow", "stream.arrow", "disk"])
def test_damaged_offsets_do_not_end_the_process(tmp_path: Path, write_rows: Callable[..., Path], kind: str) -> None:
    """Unchecked, they are addresses outside the file, and reading them is a segmentation fault."""
    path = write_rows(tmp_path, kind, ["word"] * 3)
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    good = file.read_bytes()
    offsets = struct.pack("<4i", 0, 4, 8, 12)
    assert good.count(offsets) == 1
    # a new file in its place: the old one may still be mapped
    file.unlink()
    file.write_bytes(good.replace(offsets, struct.pack("<4i", 0, 4, 2**30, 2**31 - 1)))
    with pytest.raises(UserError, match=r"cannot be read \(.*; give an intact file"):
        load_corpus(str(path), num_texts=3)
