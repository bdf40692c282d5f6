from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.workloads.corpus import (
    check_corpus,
    contiguous_parts,
    hash_texts,
    join_rows,
    load_corpus,
    split_articles,
)

WIKITEXT = Path("/work/shared/data/wikitext-2-raw/wiki.test.raw")
# the text of the original perplexity script
PUBLISHED = "sha256:c5b5caea5bd655cb221545a484f2f0f59d35092a17a66840d7b9513d0b99687d"
WriteRows = Callable[..., Path]


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


@pytest.mark.parametrize("suffix", ["txt", "raw"])
def test_windows_line_ends_and_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    unix, windows = tmp_path / f"unix.{suffix}", tmp_path / f"windows.{suffix}"
    unix.write_bytes("one\n\ntwo é\n".encode())
    windows.write_bytes("\ufeffone\r\n\r\ntwo é\r\n".encode())
    first, second = (load_corpus(str(path), num_texts=1) for path in (unix, windows))
    assert first.texts == second.texts == ("one\n\ntwo é\n",)
    assert first.text_hash == second.text_hash
    assert first.join_rule == "each file is one text"


def test_windows_line_ends_in_rows(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows(tmp_path, "parquet", ["a\r\nb"])
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
    """Under its name, with blank rows dropped, the raw file is the text of the data set; otherwise it is itself."""
    corpus = load_corpus("wikitext2", path=str(WIKITEXT), num_texts=1, option="--kv-dataset-path", drop_blank=True)
    assert len(corpus.texts[0]) == 1_291_402
    assert corpus.text_hash == PUBLISHED
    assert (corpus.name, corpus.source, corpus.revision) == ("wikitext2", str(WIKITEXT), None)
    assert corpus.join_rule == r"each line is a row; non-blank rows joined by \n\n"
    whole = load_corpus("wikitext2", path=str(WIKITEXT), num_texts=1)
    assert whole.join_rule == "each file is one text"
    assert whole.texts == (WIKITEXT.read_text(encoding="utf-8").replace("\r\n", "\n"),)
    # only the name makes rows of lines
    assert load_corpus(str(WIKITEXT), num_texts=1, drop_blank=True).texts == whole.texts


@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"{WIKITEXT} is not here")
@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "dict"])
def test_wikitext_rows_are_the_published_text(tmp_path: Path, write_rows: WriteRows, kind: str) -> None:
    """The rows as the hub has them: a blank one before and after each heading, all with their newline."""
    lines = [line for line in WIKITEXT.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = [row for line in lines for row in (["", line + "\n", ""] if line.startswith(" =") else [line + "\n"])]
    assert len(lines) == 2891
    path = str(write_rows(tmp_path, kind, rows))
    assert load_corpus("wikitext2", path=path, num_texts=1, drop_blank=True).text_hash == PUBLISHED
    everything = load_corpus("wikitext2", path=path, num_texts=1)
    assert everything.texts == ("\n\n".join(rows),)
    assert everything.text_hash != PUBLISHED


@pytest.mark.parametrize("kind", ["parquet", "arrow", "disk", "dict", "jsonl", "json.gz"])
def test_file_that_stands_for_a_data_set_follows_its_rule(tmp_path: Path, write_rows: WriteRows, kind: str) -> None:
    rows = ["", " = A = \n", "", " words \n"]
    path = str(write_rows(tmp_path, kind, rows))
    kept, dropped = (load_corpus("wikitext103", path=path, num_texts=1, drop_blank=drop) for drop in (False, True))
    assert kept.texts == ("\n\n".join(rows),)
    assert dropped.texts == (" = A = \n\n\n words \n",)
    assert kept.join_rule == r"all rows, blank ones too, joined by \n\n"
    assert dropped.join_rule == r"non-blank rows joined by \n\n"
    for corpus in (kept, dropped):
        assert (corpus.name, corpus.source, corpus.revision) == ("wikitext103", path, None)
        assert "same text as that of wikitext2" in corpus.notes[0]
    sample = load_corpus("c4", path=path, num_texts=1, split="test")
    assert sample.texts == ("  = A = \n   words \n",)
    assert sample.join_rule == "sample: the first 4 documents, joined by single spaces, as GPTQ's evaluation does"
    for name in ("pg19", "my-books"):
        books = load_corpus(name, path=path, num_texts=2)
        assert (books.name, books.texts) == (name, (rows[1], rows[3]))
        assert books.join_rule.startswith("each row is one text")


@pytest.mark.parametrize("name", ["wikitext2", "pg19", "c4", "my-book"])
def test_text_file_that_stands_for_a_data_set_is_one_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\n\ntwo\n")
    corpus = load_corpus(name, path=str(path), num_texts=1)
    assert (corpus.name, corpus.texts, corpus.join_rule) == (name, ("one\n\ntwo\n",), "each file is one text")
    assert load_corpus(f"somebody/{name}", path=str(path), num_texts=1).name == name


@given(st.lists(st.text("a \n\u2028\x0c")), st.booleans())
def test_lines_of_a_wikitext_file_end_at_newlines_only(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], last: bool
) -> None:
    rows = [line.replace("\n", "") + "\n" for line in lines] + ["the end"] * last
    path = tmp_path_factory.mktemp("lines") / "x.raw"
    path.write_text("".join(rows), encoding="utf-8", newline="\n")
    expected = "\n\n".join(row for row in rows if row.strip())
    if expected:
        corpus = load_corpus("wikitext2", path=str(path), num_texts=1, drop_blank=True)
        assert corpus.texts == (expected,)
    else:
        with pytest.raises(UserError, match="no text in it"):
            load_corpus("wikitext2", path=str(path), num_texts=1, drop_blank=True)


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
    with pytest.raises(UserError, match=r"^--kv-dataset=wikitext4: no such corpus or file.*wikitext103, pg19, c4;"):
        load_corpus("wikitext4", num_texts=1, option="--kv-dataset")


@pytest.mark.parametrize("ask", [load_corpus, check_corpus])
def test_paths_that_cannot_stand_for_a_name(tmp_path: Path, ask: Callable[..., object]) -> None:
    path = tmp_path / "x.txt"
    path.write_text("words")
    more = {"num_texts": 1} if ask is load_corpus else {}
    for name in ("default", "pydoc", str(path)):
        with pytest.raises(UserError) as caught:
            ask(name, option="--kv-dataset-path", path=str(path), **more)
        assert str(caught.value).startswith(
            f"--kv-dataset-path={path}: cannot stand for {name}, which is a text of its own"
        )
        assert "--kv-dataset=wikitext2" in str(caught.value)
    with pytest.raises(UserError) as caught:
        ask("default", option="--kv-dataset-path", path=str(path.rename(tmp_path / "a,b.txt")), **more)
    assert str(caught.value).endswith("--kv-dataset=wikitext2"), "alone it would be two data sets"
    path.write_text("words")
    with pytest.raises(UserError, match=r"^--kv-dataset-path=nowhere\.raw: no such file or folder; check the path$"):
        ask("wikitext2", option="--kv-dataset-path", path="nowhere.raw", **more)
    # no path at all: an option that is not given
    with pytest.raises(
        UserError, match=r"^--kv-dataset=nowhere: no such corpus.*; commas separate .* --kv-dataset-path, "
    ):
        ask("nowhere", option="--kv-dataset", path="", **more)


def test_names_that_need_no_path() -> None:
    for name in ("default", "pydoc", "wikitext2", "wikitext103", "pg19", "c4"):
        check_corpus(name, option="--kv-dataset")
    check_corpus("my-book", option="--kv-dataset-path", path=str(Path(__file__)))
