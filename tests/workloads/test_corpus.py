from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.workloads.corpus import contiguous_parts, hash_texts, join_rows, load_corpus, split_articles

ROOT = Path(__file__).parents[2]
WIKITEXT = Path("/work/shared/data/wikitext-2-raw/wiki.test.raw")
ROWS = ["short", "a text that is long enough", "x" * 100, "y" * 200]


def test_default_corpus() -> None:
    corpus = load_corpus("default", num_texts=1)
    (text,) = corpus.texts
    assert len(text.split()) >= 2600
    assert text.startswith("Danube\n\n")
    assert "\r" not in text
    assert "\n\n\n" not in text
    assert corpus.text_hash == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    assert (corpus.name, corpus.join_rule) == ("default", "whole text")


@pytest.mark.parametrize("request_", ["default", "pydoc"])
def test_parts_are_contiguous_and_about_equal(request_: str) -> None:
    whole = load_corpus(request_, num_texts=1).texts[0]
    for count in (2, 3):
        corpus = load_corpus(request_, num_texts=count)
        assert "\n\n".join(corpus.texts) == whole
        lengths = list(map(len, corpus.texts))
        assert len(lengths) == count
        assert max(lengths) < 1.5 * min(lengths)
        assert corpus.join_rule.startswith(f"{count} contiguous parts")


def test_articles_begin_with_their_title() -> None:
    articles = split_articles(load_corpus("default", num_texts=1).texts[0])
    assert [article.partition("\n")[0] for article in articles] == [
        "Danube", "Copper", "Photosynthesis", "Printing", "Bridge",
        "Tide", "Samarkand", "Baroque music", "Glacier", "Telescope",
    ]  # fmt: skip


@given(st.lists(st.text("ab", min_size=1), min_size=1), st.integers(1, 8))
def test_parts_lose_nothing(articles: list[str], count: int) -> None:
    parts = contiguous_parts(articles, count)
    assert "\n\n".join(parts) == "\n\n".join(articles)
    assert len(parts) == min(count, len(articles))


def test_pydoc_is_real_prose_of_this_python() -> None:
    corpus = load_corpus("pydoc", num_texts=1)
    assert len(corpus.texts[0]) > 300_000
    assert corpus.revision == "python-{}.{}.{}".format(*sys.version_info)


def write(folder: Path, kind: str, column: str = "text", rows: list[str] = ROWS) -> Path:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict
    from pyarrow import parquet

    table = pa.table({"id": list(range(len(rows))), column: rows})
    path = folder / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in table.to_pylist()) + "\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(table.to_pylist(), indent=1), encoding="utf-8")
    elif kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "stream.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "disk":
        Dataset(table).save_to_disk(path)
    elif kind == "dict":
        DatasetDict({"test": Dataset(table)}).save_to_disk(path)
    return path


KINDS = ["jsonl", "json", "parquet", "arrow", "stream.arrow", "disk", "dict"]


@pytest.mark.parametrize("column", ["text", "body"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_of_file(tmp_path: Path, kind: str, column: str) -> None:
    path = write(tmp_path, kind, column)
    corpus = load_corpus(str(path), num_texts=4)
    assert corpus.texts == tuple(ROWS)
    assert (corpus.name, corpus.source) == (path.name, str(path))
    # the first texts that qualify, not the first rows
    assert load_corpus(str(path), num_texts=2, min_chars=20).texts == (ROWS[1], ROWS[2])
    assert load_corpus(str(path), num_texts=1, min_chars=200).texts == (ROWS[3],)


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_texts(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    with pytest.raises(UserError, match=r"only 2 text\(s\) with at least 50 characters, 3 asked"):
        load_corpus(str(path), num_texts=3, min_chars=50)


@pytest.mark.parametrize("kind", KINDS)
def test_text_column_must_be_clear(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

    rows: list[dict[str, Any]] = [{"title": "a", "body": "b", "n": 1}]
    path = tmp_path / f"x.{kind}"
    if kind in ("jsonl", "json"):
        path.write_text(json.dumps(rows[0] if kind == "jsonl" else rows))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind.endswith("arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(rows).schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows))
    elif kind == "disk":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(path)
    with pytest.raises(UserError, match=r"no column text.*body, n, title.*rename") as caught:
        load_corpus(str(path), num_texts=1)
    assert str(caught.value).startswith(f"--kv-corpus={path}")


def test_missing_values_never_qualify(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": null}\n{"text": " \\n"}\n{"text": "words"}\n')
    assert load_corpus(str(path), num_texts=1).texts == ("words",)


@pytest.mark.parametrize("suffix", ["txt", "raw"])
def test_windows_line_ends_and_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    unix, windows = tmp_path / f"unix.{suffix}", tmp_path / f"windows.{suffix}"
    unix.write_bytes("one\n\ntwo é\n".encode())
    windows.write_bytes("\ufeffone\r\n\r\ntwo é\r\n".encode())
    first, second = (load_corpus(str(path), num_texts=1) for path in (unix, windows))
    assert first.texts == second.texts == ("one\n\ntwo é\n",)
    assert first.text_hash == second.text_hash
    assert first.join_rule == "each file is one text"


def test_windows_line_ends_in_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", rows=["a\r\nb"])
    assert load_corpus(str(path), num_texts=1).texts == ("a\nb",)


def test_hash_tells_texts_apart() -> None:
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    assert hash_texts(["ab"]) == hash_texts(("ab",))


def test_join_rows() -> None:
    rows = ["", " = Title = \n", "", " words \r\n"]
    assert join_rows(rows) == "\n\n = Title = \n\n\n\n\n words \n"
    assert join_rows(rows, drop_blank=True) == " = Title = \n\n\n words \n"


@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"{WIKITEXT} is not here")
def test_wikitext_file_is_the_published_text() -> None:
    """The text of the original perplexity script, known by its length and hash."""
    corpus = load_corpus(str(WIKITEXT), num_texts=1)
    rows = [line for line in corpus.texts[0].splitlines(keepends=True) if line.strip()]
    joined = join_rows(rows, drop_blank=True)
    assert len(rows) == 2891
    assert len(joined) == 1_291_402
    assert hash_texts([joined]) == "sha256:c5b5caea5bd655cb221545a484f2f0f59d35092a17a66840d7b9513d0b99687d"


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--kv-corpus=nowhere\.txt: no such corpus or file.*default, pydoc"):
        load_corpus("nowhere.txt", num_texts=1)
    with pytest.raises(UserError, match="ask for at least 1"):
        load_corpus("default", num_texts=0)
    with pytest.raises(UserError, match=r"only 10 text\(s\).*11 asked"):
        load_corpus("default", num_texts=11)
    with pytest.raises(UserError, match=r"only 0 text\(s\) with at least 99999 characters"):
        load_corpus("default", num_texts=1, min_chars=99_999)
    unknown = tmp_path / "x.docx"
    unknown.write_bytes(b"x")
    with pytest.raises(UserError, match=r"unknown kind of file.*\.jsonl"):
        load_corpus(str(unknown), num_texts=1)
    with pytest.raises(UserError, match=r"Dataset\.save_to_disk"):
        load_corpus(str(tmp_path), num_texts=1)
    with pytest.raises(UserError, match=r"no split 'validation'.*test"):
        load_corpus(str(write(tmp_path, "dict")), num_texts=1, split="validation")
    with pytest.raises(UserError, match="no split 'dev'"):
        load_corpus("wikitext2", num_texts=1, split="dev")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt", b"\xff\xfe\x00\xd8"),
        ("x.jsonl", b'{"text": '),
        ("x.jsonl", b'"words"\n'),
        ("x.json", b"[1, 2]"),
        ("x.parquet", b"no parquet"),
        ("x.arrow", b"no arrow"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_corpus(str(path), num_texts=1)
    assert str(caught.value).startswith(f"--kv-corpus={path}: ")
    assert "give" in str(caught.value)
    assert "\n" not in str(caught.value)


def run(code: str, home: Path) -> list[str]:
    """Run code offline in a fresh interpreter with a hub cache of its own; return the lines it prints."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from kvsuite.workloads.corpus import load_corpus\n" + code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["pg19", "wikitext2", "wikitext103"])
def test_offline_answer_is_quick_and_names_the_mend(tmp_path: Path, name: str) -> None:
    code = f"""
from kvsuite.errors import UserError
try:
    load_corpus("{name}", num_texts=1)
except UserError as error:
    print(error)
"""
    started = time.perf_counter()
    (message,) = run(code, tmp_path)
    assert time.perf_counter() - started < 5
    assert message.startswith(f"--kv-corpus={name}: ")
    assert ".parquet" in message


def hub_dataset(home: Path, repo: str, files: dict[str, list[str]]) -> str:
    """Lay out a hub cache as huggingface_hub does after a download."""
    import pyarrow as pa
    from pyarrow import parquet

    commit = "89abcdef0123456789abcdef0123456789abcdef"
    repository = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name, rows in files.items():
        path = repository / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({"text": rows}), path)
    return commit


def test_named_corpora_come_out_of_the_local_hub_cache(tmp_path: Path) -> None:
    wiki = ["", " = A = \n", " words \n"]
    commit = hub_dataset(
        tmp_path,
        "Salesforce/wikitext",
        {
            "wikitext-2-raw-v1/test-00000-of-00001.parquet": wiki,
            "wikitext-103-raw-v1/test-00000-of-00001.parquet": wiki,
        },
    )
    hub_dataset(tmp_path, "emozilla/pg19", {"data/test-00000-of-00001-29a571947c0b5ccc.parquet": ROWS})
    code = """
import json
for name, count, least in (("wikitext2", 1, 0), ("wikitext103", 1, 0), ("pg19", 2, 50)):
    c = load_corpus(name, num_texts=count, min_chars=least)
    print(json.dumps([c.texts, c.revision, c.notes, c.text_hash, c.source, c.join_rule]))
"""
    first, second, books = (json.loads(line) for line in run(code, tmp_path))
    assert first[0] == ["\n\n = A = \n\n\n words \n"]
    assert first[1] == commit
    assert first[2] == []
    assert second[3] == first[3], "equal text, equal hash"
    assert "same text" in second[2][0]
    assert books[0] == ROWS[2:]
    assert books[4] == "emozilla/pg19:test"


def test_split_that_the_local_hub_cache_lacks(tmp_path: Path) -> None:
    hub_dataset(tmp_path, "emozilla/pg19", {"data/test-00000-of-00001.parquet": ROWS})
    code = """
from kvsuite.errors import UserError
try:
    load_corpus("pg19", num_texts=1, split="train")
except UserError as error:
    print(error)
"""
    (message,) = run(code, tmp_path)
    assert "no train split" in message
