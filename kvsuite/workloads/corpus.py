"""Corpora: the texts that perplexity is measured on, normalised, hashed, and cut by a rule that the record can name."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from io import StringIO
from itertools import islice
from pathlib import Path

from kvsuite.errors import UserError
from kvsuite.options.paths import expanded

from .hub_texts import HUB, check_split, hub_rows
from .text_files import is_plain, text_rows

NAMES = ("default", "pydoc", *HUB)
_WIKITEXT = ("wikitext2", "wikitext103")
_C4_DOCUMENTS = 1100
_WHOLE = "each file is one text"
_ROWS = "each row is one text; the first rows that are long enough"


@dataclass(frozen=True)
class Corpus:
    """Texts to score.

    Parameters
    ----------
    name
        Short name: the request, or a file's name without its folder.
    texts
        Normalised: UTF-8 without a byte order mark, CRLF turned into LF, nothing else changed.
    source
        Where the texts come from.
    revision
        Commit of the data set or version of the source, ``None`` for local files; `text_hash` identifies every corpus.
    text_hash
        ``sha256:<hex>`` over the normalised texts, joined by a NUL character.
    join_rule
        How texts were made of rows, articles or files.
    notes
        What a reader of a result must know.
    split
        Split of a data set, ``None`` for a text that has none.
    """

    name: str
    texts: tuple[str, ...]
    source: str
    revision: str | None
    text_hash: str
    join_rule: str
    notes: tuple[str, ...] = ()
    split: str | None = None


def check_corpus(
    request: str, *, option: str = "--kv-corpus", path: str | None = None, split: str | None = None
) -> None:
    """Find out what can be known about a request without reading it or asking the hub.

    Parameters are those of `load_corpus`.

    Raises
    ------
    UserError
        If it is neither a known name nor an existing path, has no such split, or goes with no ``path``.
    """
    typed = f"{option}={path or request}"
    if path and not os.path.exists(expanded(path)):
        raise UserError(f"{typed}: no such file or folder; check the path")
    is_file = request not in NAMES and os.path.exists(expanded(request))
    if not path and not is_file and request not in NAMES:
        # this option's list was cut before it came here
        comma = (
            "; commas separate data sets: a path that has one goes into --kv-dataset-path, its name into --kv-dataset"
        )
        hint = comma if option == "--kv-dataset" else ""
        raise UserError(f"{typed}: no such corpus or file; check the path, or choose one of {', '.join(NAMES)}{hint}")
    if path and (is_file or request in ("default", "pydoc")):
        alone = "" if "," in path else f", or give --kv-dataset={path} alone"
        raise UserError(
            f"{typed}: cannot stand for {request}, which is a text of its own; name what the file holds, for example "
            f"--kv-dataset=wikitext2{alone}"
        )
    if split and request in HUB and not path:
        check_split(request, split, typed=typed)


def load_corpus(
    request: str,
    *,
    num_texts: int,
    min_chars: int = 0,
    split: str | None = None,
    option: str = "--kv-corpus",
    path: str | None = None,
    drop_blank: bool = False,
    join: bool = False,
) -> Corpus:
    r"""Load a corpus.

    Parameters
    ----------
    request
        ``default`` (articles shipped with kvsuite), ``pydoc`` (the language reference inside every CPython), a path
        (a file with one of `text_files.SUFFIXES`, or a folder made by ``Dataset.save_to_disk``), or ``pg19``,
        ``wikitext2``, ``wikitext103``, ``c4`` from the hub. Rows hold their text in the column ``text`` or in their
        only column of strings.
    num_texts
        Number of texts wanted. ``default`` and ``pydoc`` are cut into as many contiguous parts of about equal length,
        at article boundaries (1: the whole text); WikiText, C4 and a text file are one text; of everything else the
        first ``num_texts`` rows *that qualify* are taken.
    min_chars
        A text qualifies if it has at least so many characters; a blank text never does.
    split
        Split of a data set: ``train``, ``validation`` or ``test``; ``None`` is test, or validation of C4, which has no
        test split. Files have none.
    option
        The option to name in messages: the one that gave ``path``, if there is one, else the one that gave ``request``.
    path
        Local file or folder that is read instead of the hub, while ``request`` stays the name; any name will do. The
        rows of a data set known by name are made to texts as if they came from the hub.
    drop_blank
        Leave the blank rows of WikiText out, as the original perplexity script did. The rows are joined by ``"\n\n"``;
        those of a text file under its name are then its lines (otherwise the file is the text). Nothing else has blank
        rows that count.
    join
        Make one text of the rows of a file that is no data set known by name, as of WikiText's.

    Raises
    ------
    UserError
        If the corpus is unknown, missing, unreadable, not reachable, or has fewer qualifying texts than asked.
    """
    typed = f"{option}={path or request}"
    if num_texts < 1:
        raise UserError(f"{typed}: {num_texts} texts asked; ask for at least 1")
    check_corpus(request, option=option, path=path, split=split)
    split = split or (HUB[request].usual_split if request in HUB else "test")
    has_splits = request in HUB or expanded(path or request).is_dir()
    notes: tuple[str, ...] = ()
    revision: str | None = None
    name = request
    candidates: Iterable[str]
    if request == "default":
        articles = split_articles(_embedded())
        source, join_rule = "kvsuite/workloads/encyclopedia.txt", _parts_rule(num_texts)
        candidates = contiguous_parts(articles, num_texts)
    elif request == "pydoc":
        source, revision, join_rule = "pydoc_data.topics", f"python-{platform.python_version()}", _parts_rule(num_texts)
        candidates = contiguous_parts(_pydoc(), num_texts)
    elif request in HUB and not path:
        rows, revision = hub_rows(request, split, typed=typed)
        source = f"{HUB[request].repo_id}:{HUB[request].place(split)}"
        candidates, join_rule = _texts_of(request, rows, drop_blank=drop_blank)
    else:
        file = expanded(path or request)
        source = str(file)
        # the name goes into file names
        name = Path(request).name if path else file.name
        candidates = text_rows(file, typed=typed, split=split)
        if not is_plain(file):
            rule_of = _WIKITEXT[0] if join and request not in HUB else request
            candidates, join_rule = _texts_of(rule_of, candidates, drop_blank=drop_blank)
        elif request in _WIKITEXT and drop_blank:
            lines = (line for text in candidates for line in StringIO(text, newline="\n"))
            candidates, join_rule = _texts_of(request, lines, drop_blank=True)
            join_rule = f"each line is a row; {join_rule}"
        else:
            join_rule = _WHOLE
    if request == "wikitext103" and split != "train":
        notes = (f"the {split} split of wikitext103 is the same text as that of wikitext2",)
    texts = _qualifying(candidates, num_texts, min_chars, typed)
    return Corpus(name, texts, source, revision, hash_texts(texts), join_rule, notes, split if has_splits else None)


def _texts_of(name: str, rows: Iterable[str], *, drop_blank: bool) -> tuple[Iterable[str], str]:
    """Texts that the rows of a data set make, and the rule they are made by."""
    if name in _WIKITEXT:
        kept = "non-blank rows" if drop_blank else "all rows, blank ones too,"
        return [join_rows(rows, drop_blank=drop_blank)], rf"{kept} joined by \n\n"
    if name == "c4":
        documents = list(islice(rows, _C4_DOCUMENTS))
        rule = f"sample: the first {len(documents):,} documents, joined by single spaces, as GPTQ's evaluation does"
        return [" ".join(documents)], rule
    return rows, _ROWS


def _qualifying(candidates: Iterable[str], num_texts: int, min_chars: int, typed: str) -> tuple[str, ...]:
    filled = (text for text in map(normalise, candidates) if text.strip())
    texts: list[str] = []
    longest = 0
    for text in filled:
        longest = max(longest, len(text))
        if len(text) >= min_chars:
            texts.append(text)
        if len(texts) == num_texts:
            return tuple(texts)
    if not longest:
        raise UserError(f"{typed}: there is no text in it, or blanks only; give another corpus")
    raise UserError(
        f"{typed}: only {len(texts)} text(s) with at least {min_chars} characters, {num_texts} asked; "
        "ask for fewer or shorter texts, or give another corpus"
    )


def normalise(text: str) -> str:
    """Turn CRLF into LF, so that a file copied through Windows is the same text. Nothing else is touched."""
    return text.replace("\r\n", "\n")


def hash_texts(texts: Sequence[str]) -> str:
    """Return ``sha256:<hex>`` over the texts joined by NUL; of a single text, simply its own digest."""
    return "sha256:" + hashlib.sha256("\0".join(texts).encode()).hexdigest()


def join_rows(rows: Iterable[str], *, drop_blank: bool = False) -> str:
    r"""Join the rows of WikiText by ``"\n\n"``, as the Hugging Face documentation does.

    Parameters
    ----------
    rows
        Rows as the data set has them, each with its own final newline.
    drop_blank
        Leave blank rows out, as the original perplexity script did; another text, and another perplexity.
    """
    return "\n\n".join(normalise(row) for row in rows if row.strip() or not drop_blank)


def split_articles(text: str) -> list[str]:
    """Cut a text at its titles: paragraphs of one line, at most 60 characters, without a full stop at the end."""
    articles: list[list[str]] = []
    for paragraph in text.strip().split("\n\n"):
        title = "\n" not in paragraph and len(paragraph) <= 60 and not paragraph.endswith(".")
        if title or not articles:
            articles.append([])
        articles[-1].append(paragraph)
    return ["\n\n".join(paragraphs) for paragraphs in articles]


def contiguous_parts(articles: Sequence[str], count: int) -> list[str]:
    """Join articles to ``count`` contiguous parts of about equal length; to fewer if there are too few articles."""
    count = min(count, len(articles))
    total = sum(map(len, articles))
    parts: list[list[str]] = [[]]
    done = 0
    for place, article in enumerate(articles):
        enough = done + len(article) / 2 > total * len(parts) / count
        must = len(articles) - place <= count - len(parts)
        if parts[-1] and len(parts) < count and (enough or must):
            parts.append([])
        parts[-1].append(article)
        done += len(article)
    return ["\n\n".join(part) for part in parts]


def _parts_rule(count: int) -> str:
    return "whole text" if count == 1 else f"{count} contiguous parts of about equal length, cut at article boundaries"


def _embedded() -> str:
    return resources.files("kvsuite.workloads").joinpath("encyclopedia.txt").read_text(encoding="utf-8")


def _pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
